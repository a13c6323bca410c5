"""Edits written into LocFT deltas in closed form: MEMIT, AlphaEdit and UltraEdit, instead of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ..data.edits import Edit
from ..data.generated_text import generate_prefixes
from ..engine.memory import Usage, measured_usage
from ..engine.model_state import evaluating
from ..engine.padding import batches_by_length, pad_right
from ..engine.preparations import Preparations
from ..engine.tail import logits_at
from ..io.parameter_names import clean_name
from ..tuner.delta import Delta
from ..tuner.layer import LocFTLayer
from ..tuner.model import locft_layers
from ..tuner.presets import find_decoder_layers
from ..tuner.structure import text_config
from .alphaedit import alphaedit_delta, null_space
from .config import BreadthFirstConfig
from .edit_positions import PlacedRows, control_rows, placed_rows
from .input_statistics import InputStatistics, input_dimension, input_statistics, layer_numbers, statistics_folder
from .memit import memit_delta
from .preservation import NullSpaceProjector
from .target_values import TOKENS_IN_A_FORWARD, LayersBehind, TargetValues, ValueSearch, target_values
from .training_data import preserved_text
from .ultraedit import LifelongNormalizer, ultraedit_delta

ClosedForm = Literal["MEMIT", "AlphaEdit", "UltraEdit"]


@dataclass(frozen=True)
class ClosedFormSettings:
    """What a closed-form method leaves open; each uses some of these.

    Args:
        damping: MEMIT: λ of `memit_delta`. AlphaEdit: λ of `alphaedit_delta`. UltraEdit: the ridge.
        energy_share: AlphaEdit: the share of the preserved text's energy whose directions are closed.
        rate: UltraEdit: the size of the step.
        edits_per_turn: UltraEdit: edits that are solved together; each turn starts from the model of the one before.
        num_prefixes: MEMIT and AlphaEdit: generated texts before each prompt, over which keys and losses are averaged.
        search: MEMIT and AlphaEdit: how target values are found.
    """

    damping: float
    energy_share: float = 0.9
    rate: float = 1e-6
    edits_per_turn: int = 100
    num_prefixes: int = 2
    search: ValueSearch = field(default_factory=ValueSearch)


@dataclass(frozen=True)
class ClosedFormRecord:
    """What a reader of the results should know.

    Args:
        notes: in words.
        reused: what the target values used, if they are those of an earlier call; `None`: they were found anew.
    """

    notes: list[str] = field(default_factory=list)
    reused: Usage | None = None


class SharedWork:
    """What edits in closed form on one base have in common: generated texts, statistics, target values.

    Attributes:
        values: target values by all that they depend on, each with what it used.
    """

    def __init__(self) -> None:
        self.values: dict[Any, tuple[TargetValues, Usage]] = {}
        self._prefixes: dict[tuple[int, int], tuple[str, ...]] = {}
        self._texts: dict[int, torch.Tensor] = {}
        self._statistics: dict[tuple[int, str], InputStatistics] = {}

    def prefixes(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, num: int, args: BreadthFirstConfig
    ) -> tuple[str, ...]:
        """Return texts that the base generates to stand before prompts."""
        if (num, args.seed) not in self._prefixes:
            made = Preparations(model, args.preserve_cache_dir)
            short = num // 2
            found = generate_prefixes(model, tokenizer, short, num - short, seed=args.seed, preparations=made)
            self._prefixes[num, args.seed] = found
        return self._prefixes[num, args.seed]

    def statistics(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], args: BreadthFirstConfig
    ) -> dict[str, InputStatistics]:
        """Return the statistics of modules' inputs over the preserved text, by name."""
        seed = args.seed
        missing = [name for name in names if (seed, name) not in self._statistics]
        if missing:
            if seed not in self._texts:
                made = Preparations(model, args.preserve_cache_dir)
                self._texts[seed] = preserved_text(model, tokenizer, args, made)
            folder, progress = statistics_folder(model, args.preserve_cache_dir), not args.disable_tqdm
            found = input_statistics(model, self._texts[seed], missing, cache_dir=folder, progress=progress)
            self._statistics |= {(seed, name): each for name, each in found.items()}
        return {name: self._statistics[seed, name] for name in names}


@dataclass(frozen=True)
class Located:
    """One LocFT layer with a delta of its weight.

    Args:
        name: of the module in the base model.
        layer: the LocFT layer.
        number: of the decoder layer that holds it; `None`: it is in none.
    """

    name: str
    layer: LocFTLayer
    number: int | None

    def add(self, change: torch.Tensor) -> None:
        """Add a change, (d_out, d_in), to the delta."""
        change = change if input_dimension(self.layer.base_layer) == 1 else change.T
        with torch.no_grad():
            delta = self.delta.tensors()["weight"]
            delta += change.to(delta)

    @property
    def delta(self) -> Delta:
        return cast(Delta, self.layer.locft_delta["default"])


def edit_in_closed_form(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    method: ClosedForm,
    settings: ClosedFormSettings,
    args: BreadthFirstConfig,
    *,
    shared: SharedWork | None = None,
) -> ClosedFormRecord:
    """Write edits into the LocFT deltas of a model, at once.

    Args:
        model: with a new LocFT adapter named "default"; its deltas are changed.
        tokenizer: its fast tokenizer.
        edits: the edits.
        method: `"MEMIT"`, `"AlphaEdit"` or `"UltraEdit"`.
        settings: what the method leaves open.
        args: form of the texts (`append_eos`, `chat_template`), preserved text, seed and progress bar.
        shared: what earlier calls on the same base have found; `None`: everything is found anew.

    Returns:
        What a reader of the results should know.

    Raises:
        ValueError: if the location does not suit the method, see `check_location`.
    """
    located = check_location(model, method)
    if method == "UltraEdit":
        _ultraedit(model, tokenizer, edits, located, settings, args)
        return ClosedFormRecord()
    shared = SharedWork() if shared is None else shared
    _, layers = find_decoder_layers(model)
    last = located[-1].number
    assert last is not None
    prefixes = shared.prefixes(model, tokenizer, settings.num_prefixes, args)
    statistics = shared.statistics(model, tokenizer, [each.name for each in located], args)
    rows = _rows(edits, tokenizer, args, prefixes)
    key = (last, settings.search, prefixes, tuple((edit.prompt, edit.target) for edit in edits))
    reused = shared.values[key][1] if key in shared.values else None
    if key not in shared.values:
        with measured_usage(_device(model)) as usage:
            controls, progress = control_rows(edits, tokenizer), not args.disable_tqdm
            values = target_values(model, layers, last, rows, controls, settings.search, progress=progress)
        shared.values[key] = values, usage
    for place, each in enumerate(located):
        keys, states = _keys_and_states(model, layers, each, last, rows)
        # each layer of the band writes an equal part of what the layers before have left
        residuals = (shared.values[key][0].values.to(states.device) - states) / (len(located) - place)
        each.add(_solve(method, keys, residuals, statistics[each.name], settings))
    without = rows.num_without_subject
    note = f"{method}: {without} of {len(edits)} edits have no subject in their prompt; its last token was used."
    return ClosedFormRecord([note] if without else [], reused)


def check_location(model: nn.Module, method: ClosedForm) -> list[Located]:
    """Return the LocFT layers of a model in order.

    Raises:
        ValueError: if a delta is of something else than the weight of a Linear or Conv1D; or, for MEMIT and AlphaEdit,
            if its output is not added to the hidden states, or two are in one decoder layer.
    """
    found = [(clean_name(name), layer) for name, layer in locft_layers(model)]
    numbers = layer_numbers(model, [name for name, _ in found])[1]
    located = [Located(name, layer, numbers[name]) for name, layer in found]
    for each in located:
        names = each.delta.names
        if input_dimension(each.layer.base_layer) is None or names != ("weight",):
            raise ValueError(
                f"{method} changes the weight of a Linear or Conv1D; found {each.name}, a "
                f"{type(each.layer.base_layer).__name__} with deltas of {', '.join(names)}. Choose other "
                "target_modules."
            )
    if method == "UltraEdit":
        return located
    hidden = text_config(model).hidden_size
    located.sort(key=lambda each: each.number or 0)
    places = [each.number for each in located]
    for each in located:
        width = each.layer.out_features if hasattr(each.layer, "out_features") else None
        if each.number is None or width != hidden or places.count(each.number) > 1:
            raise ValueError(
                f"{method} writes hidden states and needs one module in each edited layer whose {hidden} outputs are "
                f"added to them, such as the MLP's down-projection; found {each.name} with {width} outputs. Choose "
                "other target_modules."
            )
    return located


def _solve(
    method: ClosedForm,
    keys: torch.Tensor,
    residuals: torch.Tensor,
    statistics: InputStatistics,
    settings: ClosedFormSettings,
) -> torch.Tensor:
    if method == "MEMIT":
        return memit_delta(keys, residuals, statistics.second_moment, settings.damping)
    basis = NullSpaceProjector.from_second_moment(statistics.second_moment, settings.energy_share).basis
    return alphaedit_delta(keys, residuals, null_space(basis), damping=settings.damping)


def _rows(
    edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig, prefixes: Sequence[str] = ()
) -> PlacedRows:
    return placed_rows(
        edits,
        tokenizer,
        prefixes=prefixes,
        append_eos=args.append_eos,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        target_separator=args.target_separator,
    )


def _batches(rows: PlacedRows, device: torch.device) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield the indices of some rows, and the arguments of a forward on them."""
    for numbers in batches_by_length([len(row.input_ids) for row in rows.rows], TOKENS_IN_A_FORWARD):
        ids, mask = pad_right([rows.rows[number].input_ids for number in numbers], device)
        yield numbers, {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _device(model: nn.Module) -> torch.device:
    return model.get_input_embeddings().weight.device  # type: ignore[operator]


def _keys_and_states(
    model: nn.Module, layers: nn.ModuleList, each: Located, last: int, rows: PlacedRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs of a module where the facts are read, (edits, d_in), and the last layer's states there.

    Keys are the mean over an edit's rows; states, (edits, hidden), are those of its first row. Both in float32, of the
    model as it is edited by now.
    """
    inputs: list[torch.Tensor] = [torch.empty(0)] * len(rows.rows)
    outputs = list(inputs)
    taken: dict[str, torch.Tensor] = {}

    def take(module: nn.Module, args: Any) -> None:
        taken["input"] = args[0]

    parts = LayersBehind(model, layers, last)
    with ExitStack() as stack:
        stack.callback(each.layer.register_forward_pre_hook(take).remove)
        stack.enter_context(evaluating(model))
        for numbers, batch in _batches(rows, _device(model)):
            states = parts.states(batch)
            for place, number in enumerate(numbers):
                position = rows.rows[number].position
                inputs[number] = taken["input"][place, position].float()
                outputs[number] = states[place, position].float()
    by_edit: dict[int, list[torch.Tensor]] = {}
    for row, own in zip(rows.rows, inputs, strict=True):
        by_edit.setdefault(row.edit, []).append(own)
    keys = torch.stack([torch.stack(own).mean(dim=0) for own in by_edit.values()])
    return keys, torch.stack([outputs[number] for number in rows.firsts])


# ---------------------------------------------------------------------- UltraEdit


def _ultraedit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    located: Sequence[Located],
    settings: ClosedFormSettings,
    args: BreadthFirstConfig,
) -> None:
    normalizers = {each.name: LifelongNormalizer() for each in located}
    for begin in range(0, len(edits), settings.edits_per_turn):
        rows = _rows(edits[begin : begin + settings.edits_per_turn], tokenizer, args)
        features = _inputs_and_gradients(model, rows, located)
        for each in located:
            inputs, gradients = features[each.name]
            change = ultraedit_delta(
                inputs, gradients, normalizers[each.name], rate=settings.rate, ridge=settings.damping
            )
            each.add(change)


def _inputs_and_gradients(
    model: nn.Module, rows: PlacedRows, located: Sequence[Located]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return each module's inputs and the loss's gradients by its outputs, where targets' tokens are predicted."""
    found: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {each.name: ([], []) for each in located}
    taken: dict[str, list[torch.Tensor]] = {}

    def take(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        taken[name] = [args[0].detach(), output]

    with ExitStack() as stack:
        for each in located:
            stack.callback(each.layer.register_forward_hook(partial(take, each.name)).remove)
        model.eval()
        for numbers, batch in _batches(rows, _device(model)):
            asked = [
                (place, column, int(rows.rows[number].input_ids[column + 1]))
                for place, number in enumerate(numbers)
                for column in range(rows.rows[number].target_start - 1, len(rows.rows[number].input_ids) - 1)
            ]
            places, columns, targets = torch.tensor(asked, device=_device(model)).T
            loss = cross_entropy(logits_at(model, places, columns, batch).logits.float(), targets, reduction="sum")
            loss.backward()
            for name, (inputs, output) in taken.items():
                assert output.grad is not None
                found[name][0].append(inputs[places, columns].float())
                found[name][1].append(output.grad[places, columns].float())
    model.zero_grad()
    return {name: (torch.cat(inputs), torch.cat(gradients)) for name, (inputs, gradients) in found.items()}
