"""Second moments of the inputs of modules over a text; computed once and cached on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..engine.fingerprint import layer_digests, sha256_of
from ..engine.model_state import as_base, check_vocabulary, evaluating
from ..engine.preparations import AUTO, MAX_BYTES, limit_shared_folder, preparations_folder
from ..engine.tail import logits_at
from ..io.arithmetic import tensor_sha256
from ..io.bounded_folder import mark_used
from ..io.disk_space import free_bytes
from ..io.files import atomic_file
from ..io.parameter_names import clean_name
from ..tuner.presets import find_decoder_layers


def layer_numbers(model: nn.Module, locations: Sequence[str]) -> tuple[nn.ModuleList | None, dict[str, int | None]]:
    """Return the decoder layers, and the number of the layer that holds each location; `None` if none does."""
    try:
        stack_name, layers = find_decoder_layers(model)
    except ValueError:
        return None, dict.fromkeys(locations)
    prefix = f"{clean_name(stack_name)}."
    return layers, {
        name: int(name[len(prefix) :].split(".")[0]) if name.startswith(prefix) else None for name in locations
    }


def cache_keys(model: nn.Module, locations: Sequence[str], text: Sequence[torch.Tensor]) -> dict[str, str]:
    """Return a sha256 for each location, of its name, the text, and the base model up to the layer of the location.

    Adapters are left out, so that all runs on one base share their statistics.

    Args:
        model: with or without an adapter.
        locations: names of modules in the base model.
        text: rows of token ids.

    Raises:
        ValueError: if a weight is offloaded.
    """
    layers, numbers = layer_numbers(model, locations)
    stack = list(layers or [])
    # a module outside of the layers may come after all of them
    ends = {name: len(stack) if number is None else number + 1 for name, number in numbers.items()}
    digests = layer_digests(model, stack, max(ends.values(), default=0), "preserve_cache_dir")
    lengths = torch.tensor([len(row) for row in text])
    text_sha256 = [tensor_sha256(lengths), *(tensor_sha256(row) for row in text)]
    return {name: sha256_of(name, digests[end], *text_sha256) for name, end in ends.items()}


logger = logging.getLogger(__name__)

Tokens: TypeAlias = torch.Tensor | Sequence[Sequence[int]]
MAX_TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of a module's input `k` over a text.

    Args:
        second_moment: (d_in, d_in) `C = E[k kᵀ]`, float32, on the CPU.
        num_tokens: the number of inputs.
    """

    second_moment: torch.Tensor
    num_tokens: int


def input_statistics(
    model: nn.Module,
    windows: Tokens,
    locations: Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    max_tokens_per_forward: int = MAX_TOKENS_PER_FORWARD,
    progress: bool = True,
) -> dict[str, InputStatistics]:
    """Return the second moments of the inputs of modules of a base model over a text.

    The text is read once for all modules, with adapters disabled, up to the last decoder layer with one of them. Rows
    of equal length are read together, so that there is no padding. Inputs are multiplied in float32, 2,048 at a time
    (exact to 1e-6, far less than another text would change), and the products are added in float64.

    Args:
        model: a decoder-only language model, with or without an adapter. It is not changed.
        windows: (windows, window) token ids from `text_windows`, or lists of token ids of any length. A row that
            occurs twice counts twice.
        locations: names of Linears or Conv1Ds, as in `named_modules` of the base model.
        cache_dir: folder that stores the statistics, one file per location, for later calls with the same model, text
            and location.
        max_tokens_per_forward: most tokens in a forward; a longer row is read alone.
        progress: show a progress bar.

    Returns:
        The statistics by location.

    Raises:
        ValueError: if a location does not exist, is no Linear or Conv1D, or gets no token of the text; if the text is
            empty or has tokens that the model does not know; if an adapter is merged.
        FloatingPointError: if an input is not finite.

    Example:
        >>> windows = text_windows("wikitext.txt", tokenizer, window=512, max_tokens=32_768)
        >>> input_statistics(model, windows, ["model.layers.20.mlp.down_proj"])
        {'model.layers.20.mlp.down_proj': InputStatistics(second_moment=tensor(…), num_tokens=32768)}
    """
    modules = _located(model, locations)
    rows = _rows(windows)
    check_vocabulary(model, torch.cat(rows))
    if cache_dir is None:
        return _measure(model, rows, modules, max_tokens_per_forward, progress)
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    paths = {
        name: Path(cache_dir, f"{key}.safetensors") for name, key in cache_keys(model, list(modules), rows).items()
    }
    found = {name: stored for name, path in paths.items() if (stored := _load(path)) is not None}
    missing = {name: module for name, module in modules.items() if name not in found}
    if missing:
        measured = _measure(model, rows, missing, max_tokens_per_forward, progress)
        for name, statistics in measured.items():
            _save(paths[name], name, statistics)
        limit_shared_folder()
        found |= measured
    return {name: found[name] for name in modules}


# ---------------------------------------------------------------------- arguments


def input_dimension(module: nn.Module) -> int | None:
    """Return the dimension of a module's weight along which its inputs lie; `None` if it is no Linear or Conv1D."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


def _located(model: nn.Module, locations: Sequence[str]) -> dict[str, nn.Module]:
    if not locations:
        raise ValueError("locations: found none; expected names of modules, such as 'model.layers.20.mlp.down_proj'.")
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"{clean_name(name)} has an adapter merged into it, and statistics need the base weight. Unmerge it "
                "first."
            )
        by_name[clean_name(name)] = module  # the innermost of nested wrappers
    located = {}
    for location in locations:
        module = by_name.get(location)
        if module is None:
            raise ValueError(
                f"locations: found {location!r}, which is no module of the model; expected names from "
                "`named_modules()` of the base model."
            )
        if input_dimension(module) is None:
            raise ValueError(f"locations: found {location}, a {type(module).__name__}; expected a Linear or Conv1D.")
        located[location] = module
    return located


def _rows(windows: Tokens) -> list[torch.Tensor]:
    rows = [torch.as_tensor(row, dtype=torch.int64) for row in windows]
    empty = [number for number, row in enumerate(rows) if row.numel() == 0]
    if not rows or empty:
        where = f"row {empty[0]} is empty" if empty else "there are no rows"
        raise ValueError(f"windows: {where}. Expected rows of one or more token ids.")
    if rows[0].ndim != 1:
        raise ValueError(
            f"windows: found {rows[0].ndim + 1} dimensions; expected (windows, window) token ids, or a list of lists."
        )
    return rows


# ---------------------------------------------------------------------- measuring


class _Sums:
    """Running sums of one module."""

    def __init__(self, num_features: int) -> None:
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.num_tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        for some in inputs.split(MAX_TOKENS_PER_FORWARD):
            some = some.float()
            self.products += (some.T @ some).cpu()
        self.num_tokens += len(inputs)

    def mean(self, name: str) -> InputStatistics:
        if not self.num_tokens:
            raise ValueError(
                f"locations: {name} gets no token of the text. Use more text, or leave this module out of "
                "target_modules."
            )
        mean = (self.products / self.num_tokens).float()
        if not bool(torch.isfinite(mean).all()):
            raise FloatingPointError(
                f"{name} gets inputs that are NaN or infinite. Load the model in float32 or bfloat16, and check its "
                "weights."
            )
        return InputStatistics((mean + mean.T) / 2, self.num_tokens)


def _measure(
    model: nn.Module,
    rows: list[torch.Tensor],
    modules: dict[str, nn.Module],
    max_tokens: int,
    progress: bool,
) -> dict[str, InputStatistics]:
    sums: dict[str, _Sums] = {}

    def take(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        sums.setdefault(name, _Sums(inputs.shape[1])).add(inputs)

    batches = list(_batches(rows, max_tokens))
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    bar = tqdm(batches, desc="reading preserved text", leave=False, disable=not progress or len(batches) < 4)
    with ExitStack() as stack:
        stack.enter_context(as_base(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        run = stack.enter_context(_no_further_than(model, list(modules)))
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(partial(take, name), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in bar:
            run({"input_ids": torch.stack([rows[number] for number in batch]).to(device), "use_cache": False})
    return {name: sums.get(name, _Sums(0)).mean(name) for name in modules}


def _batches(rows: list[torch.Tensor], max_tokens: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for length, numbers in by_length.items():
        at_once = max(1, max_tokens // length)
        yield from (numbers[begin : begin + at_once] for begin in range(0, len(numbers), at_once))


@contextmanager
def _no_further_than(model: nn.Module, locations: list[str]) -> Iterator[Any]:
    """Yield a function that runs the model up to the last location; of the head, no more than one token."""
    layers, numbers = layer_numbers(model, locations)
    if layers is None or None in numbers.values():
        yield lambda inputs: model(**inputs)
        return
    last = max(number for number in numbers.values() if number is not None)
    if last + 1 == len(layers):
        one = torch.zeros(1, dtype=torch.int64)
        yield lambda inputs: logits_at(model, one, one, inputs)
        return

    def stop(*arguments: Any) -> None:
        raise _Reached

    def run(inputs: dict[str, Any]) -> None:
        with suppress(_Reached):
            model(**inputs)

    handle = layers[last + 1].register_forward_pre_hook(stop)
    try:
        yield run
    finally:
        handle.remove()


class _Reached(Exception):
    """Ends a forward: what follows has no effect on the statistics."""


# ---------------------------------------------------------------------- files


def statistics_folder(model: nn.Module, option: str | Path | None) -> Path | None:
    """Return the folder that stores statistics, see `preparations_folder`; `None`: none is used.

    The folder that all runs share is left out where they would take most of it, or cannot be stored or named.
    """
    parameters = list(model.parameters())
    folder = preparations_folder(option, parameters[0].device)
    if folder is None or option != AUTO:
        return folder
    widths = [max(p.shape) for p in parameters if p.requires_grad and p.ndim == 2]
    num_bytes = sum(4 * width**2 for width in widths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fits = num_bytes < min(MAX_BYTES, free_bytes(folder)) / 2
    except OSError:
        return None
    return folder if fits and not any(p.is_meta for p in parameters) else None


def _save(path: Path, name: str, statistics: InputStatistics) -> None:
    tensors = {
        "second_moment": statistics.second_moment,
        "num_tokens": torch.tensor(statistics.num_tokens, dtype=torch.float64),
    }
    with atomic_file(path) as staged:
        save_file(tensors, staged, metadata={"location": name})


def _load(path: Path) -> InputStatistics | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        statistics = InputStatistics(tensors["second_moment"], int(tensors["num_tokens"]))
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("%s is incomplete (%s); the statistics are computed again.", path, error)
        return None
    mark_used(path)
    logger.info("Read the statistics of the preserved text from %s.", path)
    return statistics
