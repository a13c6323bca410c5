"""Target values of locate-then-edit methods: the hidden state with which the rest of the model answers an edit.

MEMIT (arXiv 2210.07229, section 4.2), which took it from ROME (arXiv 2202.05262, equation 4), and AlphaEdit write the
same values; only the change of the weights that produces them differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from tqdm.auto import tqdm

from ..engine.model_state import as_base, configuration_unchanged
from ..engine.padding import pad_right
from ..engine.tail import entering, logits_at, skipped
from .edit_positions import PlacedRow, PlacedRows

TOKENS_IN_A_FORWARD = 2048


@dataclass(frozen=True)
class ValueSearch:
    """How target values are found; the defaults are MEMIT's for GPT-J.

    Args:
        rate: of Adam.
        steps: at most; an edit whose loss is below `stop_loss` takes no more.
        kl_weight: of KL(edited || base) of the next token after "SUBJECT is a".
        decay: weight of `|δ| / |h|²`.
        clamp: largest `|δ| / |h|`.
        stop_loss: see `steps`.
    """

    rate: float = 0.5
    steps: int = 25
    kl_weight: float = 0.0625
    decay: float = 0.5
    clamp: float = 0.75
    stop_loss: float = 0.05


@dataclass(frozen=True)
class TargetValues:
    """The result of a search.

    Args:
        values: (edits, hidden) float32: the states that leave the layer where the fact is read, with `δ` added.
        losses: (edits,) mean -log p of the target's tokens with these states, in nats.
    """

    values: torch.Tensor
    losses: torch.Tensor


def target_values(
    model: nn.Module,
    layers: nn.ModuleList,
    layer: int,
    rows: PlacedRows,
    controls: Mapping[int, PlacedRow],
    search: ValueSearch,
    *,
    progress: bool = True,
) -> TargetValues:
    """Return, for each edit, the state `h + δ` after a layer with which the model gives the target.

    `δ` minimizes the mean -log p of the target's tokens over the edit's rows, plus the control's KL and a decay, by
    Adam from zero. Many edits run together; none depends on another. The states after the layer are computed once:
    a step runs the layers behind it alone.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile. It is not changed.
        layers: its decoder layers.
        layer: the number of the layer that the states leave.
        rows: the edits' texts, with their targets.
        controls: for some edits, a text after whose last token the model shall predict the same as before.
        search: rate, steps and weights.
        progress: show a progress bar.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    groups = _groups(rows, controls)
    found, losses = [], []
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bar = tqdm(total=len(rows.firsts), desc="target values", leave=False, disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(as_base(model))
        stack.enter_context(_frozen(model, frozen))
        stack.enter_context(bar)
        parts = LayersBehind(model, layers, layer)
        for group in groups:
            values, loss = _search(parts, group, search, device)
            found.append(values)
            losses.append(loss)
            bar.update(len(values))
    return TargetValues(torch.cat(found), torch.cat(losses))


def _groups(rows: PlacedRows, controls: Mapping[int, PlacedRow]) -> Iterator[list[PlacedRow]]:
    """Yield the rows and controls of some edits, in order: as many edits as fit into a forward, at least one."""
    group: list[PlacedRow] = []
    begins = [*rows.firsts, len(rows.rows)]
    for begin, end in pairwise(begins):
        own = rows.rows[begin:end]
        own = [*own, controls[own[0].edit]] if own[0].edit in controls else own
        longest = max(len(row.input_ids) for row in (*group, *own))
        if group and (len(group) + len(own)) * longest > TOKENS_IN_A_FORWARD:
            yield group
            group = []
        group = group + own
    yield group


@contextmanager
def _frozen(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compute gradients through a model, but none of its parameters, and without dropout."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with configuration_unchanged(model):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in was_training:
            module.training = True


class LayersBehind:
    """Runs a model up to a layer, and from there on: the layers before are left out where the model allows it."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, layer: int) -> None:
        self.model, self.layers, self.layer = model, layers, layer
        self.num_outputs: int | None = None  # of a layer's tuple; 0: it returns the states alone; not known yet
        self._cuts: bool | None = None  # not checked yet

    def states(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the states that leave the layer, (B, T, hidden)."""
        found: list[torch.Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            self.num_outputs = len(output) if isinstance(output, tuple) else 0
            found.append(output[0] if self.num_outputs else output)

        handle = self.layers[self.layer].register_forward_hook(take)
        one = torch.zeros(1, dtype=torch.int64, device=inputs["input_ids"].device)
        try:
            behind = [] if self.num_outputs is None else list(self.layers[self.layer + 1 :])
            with torch.no_grad(), skipped(behind, self.num_outputs or 0):
                logits_at(self.model, one, one, inputs)
        finally:
            handle.remove()
        return found[0]

    def logits(
        self, inputs: dict[str, Any], states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Return logits at (rows, columns), float32, given the states that leave the layer."""
        if self._cuts is None:
            with torch.no_grad():
                whole, part = (self._run(cuts, inputs, states, rows, columns) for cuts in (False, True))
            # a step of an optimizer does not see the rounding of half precision
            tolerance = 1e-4 if whole.dtype == torch.float32 else 0.05
            self._cuts = bool((whole - part).abs().max() <= tolerance * whole.abs().max())
        return self._run(self._cuts, inputs, states, rows, columns).float()

    def _run(
        self, cuts: bool, inputs: dict[str, Any], states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        with ExitStack() as stack:
            if cuts:
                stack.enter_context(skipped(list(self.layers[: self.layer + 1]), self.num_outputs or 0))
                stack.enter_context(entering(self.layers[0], lambda arriving: states))
            else:

                def replaced(module: nn.Module, args: Any, output: Any) -> Any:
                    return (states, *output[1:]) if isinstance(output, tuple) else states

                stack.callback(self.layers[self.layer].register_forward_hook(replaced).remove)
            logits: torch.Tensor = logits_at(self.model, rows, columns, inputs).logits
            return logits


class _Batch:
    """The padded rows of some edits, and where in them the model is asked."""

    def __init__(self, rows: Sequence[PlacedRow], device: torch.device) -> None:
        self.edits = list(dict.fromkeys(row.edit for row in rows))
        number_of = {edit: number for number, edit in enumerate(self.edits)}
        ids, mask = pad_right([row.input_ids for row in rows], device)
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        self.every = torch.arange(len(rows), device=device)
        self.positions = torch.tensor([row.position for row in rows], device=device)
        self.owner = torch.tensor([number_of[row.edit] for row in rows], device=device)
        firsts = {row.edit: number for number, row in reversed(list(enumerate(rows)))}
        self.firsts = torch.tensor([firsts[edit] for edit in self.edits], device=device)
        asked, weights, owners = [], [], []
        num_rows = Counter(row.edit for row in rows if not row.is_control)
        for number, row in enumerate(rows):
            targets = row.input_ids[row.target_start :].tolist()
            for column, token in enumerate(targets, row.target_start - 1):
                asked.append((number, column, token))
                weights.append(1 / (len(targets) * num_rows[row.edit]))
                owners.append(number_of[row.edit])
        controls = [(number, len(row.input_ids) - 1) for number, row in enumerate(rows) if row.is_control]
        self.targets = torch.tensor([token for _, _, token in asked], device=device)
        self.weights, self.target_owner = torch.tensor(weights, device=device), torch.tensor(owners, device=device)
        places = torch.tensor([place[:2] for place in asked] + controls, device=device)
        self.rows, self.columns = places[:, 0], places[:, 1]
        self.control_owner = self.owner[[number for number, _ in controls]] if controls else None

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return int(self.inputs["input_ids"].shape[1])

    def moved(self, states: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Return the states with each edit's shift added where its fact is read."""
        own = states[self.every, self.positions].float() + shifts[self.owner]
        return states.index_put((self.every, self.positions), own.to(states.dtype))

    def losses(self, logits: torch.Tensor) -> torch.Tensor:
        """Return each edit's mean -log p over rows and tokens, (edits,)."""
        each = cross_entropy(logits[: len(self.targets)], self.targets, reduction="none") * self.weights
        return torch.zeros(len(self.edits), device=each.device).index_add(0, self.target_owner, each)

    def divergences(self, logits: torch.Tensor, before: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return KL(edited || base) after each edit's control, (edits,); 0 without one."""
        divergences = torch.zeros(len(self.edits), device=logits.device)
        if self.control_owner is None:
            return divergences
        now = logits[len(self.targets) :].log_softmax(-1)
        base = torch.stack([before[self.edits[number]] for number in self.control_owner.tolist()])
        return divergences.index_add(
            0, self.control_owner, kl_div(base, now, reduction="none", log_target=True).sum(1)
        )

    def controls(self, logits: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the log-probabilities after each control, by edit."""
        owners = [] if self.control_owner is None else self.control_owner.tolist()
        found = logits[len(self.targets) :].log_softmax(-1)
        return {self.edits[number]: row for number, row in zip(owners, found, strict=True)}


def _search(
    parts: LayersBehind, rows: Sequence[PlacedRow], search: ValueSearch, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the target values and the losses of the edits of some rows."""
    batch = _Batch(rows, device)
    states = parts.states(batch.inputs)
    starts = states[batch.firsts, batch.positions[batch.firsts]].float()
    sizes = starts.norm(dim=1)
    # one tensor for each edit: Adam leaves alone what has no gradient
    shifts = [nn.Parameter(torch.zeros_like(start)) for start in starts]
    adam = torch.optim.Adam(shifts, lr=search.rate)
    with torch.no_grad():
        before = batch.controls(parts.logits(batch.inputs, states, batch.rows, batch.columns))
    losses = torch.zeros(len(shifts))
    active = list(range(len(shifts)))
    for step in range(search.steps + 1):
        now = torch.stack([shifts[number] for number in active])
        logits = parts.logits(batch.inputs, batch.moved(states, now), batch.rows, batch.columns)
        answers = batch.losses(logits)
        total = answers + search.kl_weight * batch.divergences(logits, before)
        total = total + search.decay * now.norm(dim=1) / sizes[active].square()
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError("The loss of a target value is NaN or infinite. Load the model in float32.")
        losses[active] = answers.detach().cpu()
        going = (total.detach() >= search.stop_loss).tolist()
        if step == search.steps or not any(going):
            break
        adam.zero_grad()
        total.sum().backward()
        for number, goes in zip(active, going, strict=True):
            if not goes:
                shifts[number].grad = None
        adam.step()
        _clamp(shifts, search.clamp * sizes)
        if not all(going):
            stays = [going[owner] for owner in batch.owner.tolist()]
            rows = [row for row, stay in zip(rows, stays, strict=True) if stay]
            active = [number for number, goes in zip(active, going, strict=True) if goes]
            batch = _Batch(rows, device)
            states = states[torch.tensor(stays, device=device)][:, : batch.length]
    return starts + torch.stack([shift.detach() for shift in shifts]), losses


def _clamp(shifts: Sequence[nn.Parameter], limits: torch.Tensor) -> None:
    with torch.no_grad():
        for shift, limit in zip(shifts, limits, strict=True):
            shift.mul_((limit / shift.norm().clamp(min=1e-12)).clamp(max=1.0))
