"""Made-up sequences with the model's own logits: what every short cut of the engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from ..tuner.structure import find_decoder_layers, text_config
from .full_precision import in_float32
from .model_state import evaluating, max_length
from .prefix_tree import PrefixTree

SHORTEST, LONGEST = 16, 64  # tokens of the longest sequence
# parts of its length: the shared beginning of the second sequence, its whole, a cut of the first, and a short one
SHARED, SIBLING, CUT, SHORT = 0.55, 0.85, 0.65, 0.3
MOST_LOGITS = 1024  # of a position; each depends on all of the last state
# a smaller part of what one token does to the next ones is no fault
SHARE_OF_INFLUENCE = 1e-2


class Rounding(NamedTuple):
    """Deviations that rounding may explain: at least, at most, and as a multiple of those measured.

    Logits that have nothing to do with each other deviate by more than 1, as `deviation` measures it.
    """

    floor: float
    ceiling: float
    factor: float


# where other tokens are changed and no shape is, rounding is the same, and what remains is less than this in any dtype
SAME_SHAPE = 1e-2

FLOAT32 = Rounding(1e-5, 1e-3, 10)
# deep models in bfloat16 reach 0.2
HALF = Rounding(3e-2, 0.5, 3)


@dataclass(frozen=True)
class Trial:
    """Sequences of different lengths, some with a shared beginning, and the model's logits on each alone.

    Args:
        rows: token ids of each sequence.
        expected: for each, its logits, (T, thinned V), from a forward on this sequence alone, without padding.
        bound: the largest deviation, as `deviation` measures it, that rounding explains.
        is_float32: compare in float32. `False`: in the model's own dtype, since its weights are quantized or sharded,
            or its code insists on it.
        is_consistent: what follows a token, and how much, does not change its logits.
        sees_ahead: the values of later tokens enter the logits of earlier ones.
        num_outputs: the length of the tuples that decoder layers return; 0: they return the states alone.
    """

    rows: Sequence[tuple[int, ...]]
    expected: Sequence[torch.Tensor]
    bound: float
    is_float32: bool
    is_consistent: bool
    sees_ahead: bool
    num_outputs: int = 0

    @cached_property
    def tree(self) -> PrefixTree:
        """The sequences as a tree of prefixes, with all their tokens."""
        # the tree leaves out the last token of each row, so append one
        tokens = torch.tensor([token for row in self.rows for token in (*row, 0)])
        offsets = torch.tensor([0, *(len(row) + 1 for row in self.rows)]).cumsum(0)
        return PrefixTree.of(tokens, offsets, torch.arange(len(self.rows)))

    @property
    def is_finite(self) -> bool:
        return all(bool(logits.isfinite().all()) for logits in self.expected)

    def why_not(self, found: Sequence[torch.Tensor]) -> str | None:
        """Return by how much logits, (T, thinned V) for each sequence, are not the model's own; `None`: they are."""
        return self.why_other(found, self.expected)

    def why_other(self, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
        """Return by how much logits differ from others, (T, thinned V) each; `None`: by rounding alone."""
        largest = max(deviation(*pair) for pair in zip(found, expected, strict=True))
        if largest <= self.bound:
            return None
        return f"its logits change by {largest:.1g} of their spread, where rounding explains {self.bound:.1g}"

    @contextmanager
    def running(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Set the model up as it was for the expected logits."""
        with evaluating(model):
            if not self.is_float32:
                yield
                return
            with in_float32(model, device):
                yield


def trial_length(longest: int) -> int:
    """Return the length of the longest made-up sequence for sequences of at most `longest` tokens.

    Some models change what they do at a length: a window, a chunk, the number of tokens that they choose among. Where
    these are longer than the sequences here, the mask's rule tells of them, see `why_not_packed`.
    """
    return min(max(SHORTEST, 1 << (longest - 1).bit_length()), LONGEST)


def made_up_rows(model: nn.Module, length: int) -> list[tuple[int, ...]]:
    """Return four sequences: a long one, one with the same beginning, a cut of the long one, and a short one.

    The short one has the long one's tokens, but for the first.

    Args:
        model: gives vocabulary, special tokens and number of positions.
        length: number of tokens of the longest; fewer if the model has fewer positions.
    """
    most = min(length, max_length(model) or length)
    shared, sibling, cut, short = (max(1, int(part * most)) for part in (SHARED, SIBLING, CUT, SHORT))
    # a sharded embedding does not say how many rows it has
    vocabulary_size = getattr(text_config(model), "vocab_size", None)
    if vocabulary_size is None:
        vocabulary_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    special = _special_tokens(model)
    # tokens for images and audio are often at the end of a vocabulary
    usual = [token for token in range(max(2, vocabulary_size // 2)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(usual), (2, most), generator=generator).tolist()
    long, other = ([usual[number] for number in row] for row in drawn)
    first = next((token for token in usual if token != long[0]), long[0])
    rows = (long, long[:shared] + other[shared:sibling], long[:cut], [first, *long[1:short]])
    return [tuple(row) for row in rows]


def _special_tokens(model: Any) -> set[int]:
    found: set[int] = set()
    for settings in (getattr(model, "config", None), text_config(model)):
        for name, value in vars(settings).items() if settings is not None else ():
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                found.update(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))
    return found


def make_trial(
    model: nn.Module, device: torch.device, rows: Sequence[tuple[int, ...]], *, is_sharded: bool = False
) -> Trial:
    """Run a model on made-up sequences, one at a time and unpadded.

    Args:
        model: the model.
        device: where forwards run.
        rows: the sequences, from `made_up_rows`.
        is_sharded: weights are sharded between processes, so there are no float32 copies of them.

    Raises:
        ValueError: if the model cannot run on token ids alone.
    """
    in_full = all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())
    if not is_sharded and not _is_quantized(model):
        # a family's own code may insist on its dtype, and a copy may not fit
        with suppress(Exception), evaluating(model), in_float32(model, device):
            return _trial(model, rows, device, is_float32=True)
    try:
        with evaluating(model):
            return _trial(model, rows, device, is_float32=in_full)
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"{type(model).__name__} does not run on token ids alone: {type(error).__name__}: {error}. Expected a "
            "decoder-only language model, as AutoModelForCausalLM loads it."
        ) from error


def _is_quantized(model: nn.Module) -> bool:
    """Whether a model has matrices that are not of a float dtype, and so computes in a dtype of its own."""
    if getattr(model, "is_quantized", False):
        return True
    return any(
        tensor.ndim > 1
        and (type(tensor.data) is not torch.Tensor or not tensor.is_floating_point() or tensor.itemsize < 2)
        for tensor in model.parameters()
    )


def _trial(model: nn.Module, rows: Sequence[tuple[int, ...]], device: torch.device, *, is_float32: bool) -> Trial:
    """Run the model on every row, and measure what rounding changes and what tokens do to each other."""
    num_outputs: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:
        num_outputs.append(len(output) if isinstance(output, tuple) else 0)

    layer = _first_layer(model)
    handle = None if layer is None else layer.register_forward_hook(count)
    try:
        expected = [logits_of(model, row, device) for row in rows]
    finally:
        if handle is not None:
            handle.remove()
    long, sibling, cut, short = expected
    shared = _common(rows[0], rows[1])
    # another number of tokens is another way to compute the same
    rounding = max(deviation(sibling[:shared], long[:shared]), deviation(cut, long[: len(cut)]))
    influence = deviation(short[1:], long[1 : len(short)]) if len(short) > 1 else 0.0
    floor, ceiling, factor = FLOAT32 if is_float32 else HALF
    bound = max(floor, min(factor * rounding, ceiling), min(SHARE_OF_INFLUENCE * influence, 10 * floor))
    if is_float32:
        is_consistent = rounding <= max(floor, min(SHARE_OF_INFLUENCE * influence, ceiling))
        is_suspect = not is_consistent
    else:
        other = logits_of(model, rows[0][:shared] + rows[0][: shared - 1 : -1], device)
        ahead = deviation(other[:shared], long[:shared])
        is_consistent = rounding <= ceiling and ahead <= SAME_SHAPE
        is_suspect = not is_consistent or ahead > SHARE_OF_INFLUENCE * influence
    sees_ahead = is_suspect and any(_sees_beyond(model, rows[0], place, device) for place in (shared, len(cut)))
    return Trial(rows, expected, bound, is_float32, is_consistent, sees_ahead, next(iter(num_outputs), 0))


def _sees_beyond(model: Any, row: Sequence[int], place: int, device: torch.device) -> bool:
    """Whether the embeddings of the tokens from `place` on have a gradient from the logits before it.

    A model that chooses which tokens to attend to, and leaves the later ones out afterwards, does not see them.
    """
    zeros: list[torch.Tensor] = []

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        with torch.enable_grad():
            logits = logits_of(model, row, device)[:place]
            weights = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), zeros)
    except RuntimeError:  # without a gradient, nothing tells it from a model that sees ahead
        return True
    finally:
        handle.remove()
    sizes = gradient.reshape(len(row), -1).norm(dim=-1)
    return float(sizes[place:].max()) > 1e-6 * float(sizes[:place].max())


def _first_layer(model: nn.Module) -> nn.Module | None:
    try:
        return find_decoder_layers(model)[1][0]
    except ValueError:
        return None


def logits_of(model: nn.Module, row: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the model's own logits on one sequence, (T, thinned V): alone, unpadded, without a KV cache."""
    input_ids = torch.tensor([row], device=device)
    outputs = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return thinned(outputs.logits[0])


def thinned(logits: torch.Tensor) -> torch.Tensor:
    """Return logits, (…, V), at some thousand tokens of the vocabulary at most, in float32."""
    return logits[..., :: max(1, logits.shape[-1] // MOST_LOGITS)].float()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far logits are from others: of all positions, the largest error relative to the logits' spread.

    Args:
        found: (T, V) logits.
        expected: (T, V) logits.
    """
    if found.shape != expected.shape:
        return float("inf")
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    # where a model says nothing, rounding is all there is
    spread = spread.clamp_min(max(1e-2 * float(spread.mean()), 1e-30))
    return float(((found - expected).norm(dim=-1) / spread).max())
