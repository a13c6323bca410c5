"""What a model's attention asks of transformers: which mask it wants, and which arguments it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packed_attention import attention_configs, named_attention

NAME = "locft_probe"
MOST_POSITIONS = 2**17
# arguments that packed attention handles as the model's own does, and those that a model only passes on
HANDLED = frozenset(
    "dropout scaling is_causal sliding_window position_ids position_embeddings use_cache cache_position logits_to_keep "
    "return_dict labels token_type_ids mm_token_type_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)

# (batch index, head index, query positions, key positions) to whether the query sees the key
MaskFunction = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


class _Unpackable(Exception):
    """Ends the forward: the reason is known."""


class AttentionProbe:
    """Stands for the layers' attention in one forward on one sequence, and notes what packing would get wrong.

    Attributes:
        why_not: why the attention cannot be packed; `None`: nothing speaks against it.
        num_calls: how often a layer attended.
    """

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.why_not: str | None = None
        self.num_calls = 0
        self._masks: dict[int, tuple[torch.Tensor, MaskFunction]] = {}

    def make_mask(self, *args: Any, mask_function: MaskFunction, **kwargs: Any) -> torch.Tensor:
        """Return the mask that the model wants, (1, 1, T, T), and remember its rule."""
        mask = sdpa_mask(*args, mask_function=mask_function, **(kwargs | {"allow_is_causal_skip": False}))
        self._masks[id(mask)] = (mask, mask_function)
        return mask

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.num_calls += 1
        self.why_not = self.why_not or self._why_not(module, attention_mask, kwargs)
        if self.why_not is not None:
            raise _Unpackable
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def _why_not(self, module: Any, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
        for name, value in kwargs.items():
            if name not in HANDLED and value is not None and value is not False:
                return f"its attention takes {name}"
        if not (kwargs.get("is_causal") or (kwargs.get("is_causal") is None and getattr(module, "is_causal", True))):
            return "its attention is not causal"
        if mask is None:
            return None
        if id(mask) not in self._masks:
            return "it changes its attention mask between the layers"
        rule, sliding_window = self._masks[id(mask)][1], kwargs.get("sliding_window")
        try:
            return self._why_other_mask(rule, sliding_window, self.num_positions)
        except IndexError:  # a rule that also looks at the kinds of this sequence's tokens knows no others
            return self._why_other_mask(rule, sliding_window, mask.shape[-1])

    def _why_other_mask(self, mask_function: MaskFunction, sliding_window: int | None, most: int) -> str | None:
        """Compare a mask's rule with that of packed attention up to a position, often far beyond this sequence."""
        keys = torch.arange(most)
        for position in {0, min(1, most - 1), min(7, most - 1), most // 3, most - 1}:
            query = torch.tensor(position)
            expected = keys <= query
            if sliding_window is not None:
                expected &= keys > query - sliding_window
            seen = torch.as_tensor(mask_function(0, 0, query, keys)).expand(most)
            if not torch.equal(seen.bool(), expected):
                return "its attention mask is neither causal nor a sliding window"
        return None


def why_not_packed(
    model: nn.Module, layers: Iterable[nn.Module], inputs: dict[str, Any], num_positions: int
) -> str | None:
    """Return why a model's attention cannot be packed, found by one forward; `None`: nothing speaks against it.

    Args:
        model: the model, in evaluation mode.
        layers: its decoder layers.
        inputs: one short sequence, without a mask and without padding.
        num_positions: how long the model's sequences can be.
    """
    probe = AttentionProbe(min(num_positions, MOST_POSITIONS))
    with _probing(layers, probe), suppress(_Unpackable):
        model(**inputs)
    if not probe.num_calls:
        return "it does not use transformers' attention interface"
    return probe.why_not


@contextmanager
def _probing(layers: Iterable[nn.Module], probe: AttentionProbe) -> Iterator[None]:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    _probes.append(probe)
    try:
        with named_attention(attention_configs(layers), NAME):
            yield
    finally:
        _probes.pop()


_probes: list[AttentionProbe] = []


def _attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _probes[-1].attend(*args, **kwargs)


def _make_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _probes[-1].make_mask(*args, **kwargs)
