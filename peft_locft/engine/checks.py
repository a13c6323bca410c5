"""What the engine may leave out for a model: found by comparison, once for each model and configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..io.parameter_names import clean_name
from .attention_probe import why_not_packed
from .fingerprint import configuration_of, sha256_of
from .forward_plan import ForwardPlan, Layout
from .model_state import has_scope, max_length
from .narrowing import find_narrowable
from .offload import whole_layer
from .tail import logits_at
from .trial import SAME_SHAPE, Trial, deviation, logits_of, made_up_rows, make_trial, thinned, trial_length

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

WITHOUT_LIMIT = 2**31
MOST_ROWWISE = 5e-2  # the largest relative difference of one module's output that rounding explains


class ModelChecks:
    """What was found out about one model in one configuration.

    Args:
        trial: made-up sequences with the model's own logits.
        device: where forwards run.
        longest: the largest number of tokens for which the length of one sequence changes nothing in another.
        is_sharded: the model's weights are sharded between processes.
    """

    def __init__(self, trial: Trial, device: torch.device, longest: int, *, is_sharded: bool = False) -> None:
        self.trial, self.device, self.longest, self.is_sharded = trial, device, longest, is_sharded
        # the weights are those of the trial
        self.is_fresh = True
        self._found: dict[Hashable, Any] = {}

    def why_alone(self, longest: int) -> str | None:
        """Return why each sequence has to run alone and whole; `None`: it need not.

        Args:
            longest: the number of tokens of the longest sequence.
        """
        if not self.trial.is_consistent:
            return "the number of later tokens changes the logits of earlier ones"
        if longest > self.longest:
            return f"beyond {self.longest} tokens, the longest sequence changes RoPE's frequencies for all"
        return None

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """Return what `find` returns; it is called only the first time."""
        if key in self._found:
            found: Found = self._found[key]
            return found
        found = find()
        if self.trial.is_finite:  # else nothing could be compared
            self._found[key] = found
        return found

    def why_not(self, what: str, model: nn.Module, find: Callable[[], str | None]) -> str | None:
        """Return why a short cut does not give the model's own logits on the made-up sequences; `None`: it does.

        Args:
            what: the short cut, for the log.
            model: the model; it is set up as it was for the expected logits.
            find: tries the short cut, and returns why it is not right. Whatever it raises means that it is not.
        """
        try:
            self._refresh(model)
            with self.trial.running(model, self.device):
                why = find()
        except Exception as error:  # a family's own code may raise anything
            why = f"{type(error).__name__}: {error}"
        if why is not None:
            logger.info("%s does without %s: %s.", type(_base_of(model)).__name__, what, why)
        return why

    def _refresh(self, model: nn.Module) -> None:
        """Compute the expected logits anew if the weights have changed, as training changes them."""
        if self.is_fresh:
            return
        row, expected = self.trial.rows[-1], self.trial.expected[-1]
        with self.trial.running(model, self.device):
            changed = deviation(logits_of(model, row, self.device), expected)
        if not changed <= self.trial.bound / 10:
            self.trial = make_trial(model, self.device, rows=self.trial.rows, is_sharded=self.is_sharded)
        self.is_fresh = True


_known: WeakKeyDictionary[nn.Module, dict[str, ModelChecks]] = WeakKeyDictionary()


def checks_of(model: nn.Module, device: torch.device, longest: int, *, is_sharded: bool = False) -> ModelChecks:
    """Return what is known of a model in its present configuration; the first time, run it on made-up sequences.

    Args:
        model: a decoder-only language model, with or without adapters.
        device: where forwards run.
        longest: the number of tokens of the longest sequence; the made-up ones are about as long.
        is_sharded: its weights are sharded between processes.

    Raises:
        ValueError: if the model sees tokens ahead, or cannot run on token ids alone.
    """
    base = _base_of(model)
    known = _known.setdefault(base, {})
    length = trial_length(longest)
    key = f"{length} {_key(model, base, device)}"
    if key not in known:
        trial = make_trial(model, device, made_up_rows(model, length), is_sharded=is_sharded)
        checks = ModelChecks(trial, device, _longest(base), is_sharded=is_sharded)
        if not trial.is_finite:  # nothing can be compared, and the next model with these modules may be finite
            return checks
        if trial.sees_ahead:
            raise ValueError(
                f"{type(base).__name__} is not causal: later tokens change the logits of earlier ones, so it would "
                "see the target that it is trained on. Expected a decoder-only language model. Load another model, or "
                "make this one causal in its configuration."
            )
        known[key] = checks
        return checks
    known[key].is_fresh = False
    return known[key]


def _base_of(model: Any) -> nn.Module:
    unwrapped = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return unwrapped.get_base_model() if isinstance(unwrapped, PeftModel) else unwrapped


def _key(model: Any, base: Any, device: torch.device) -> str:
    """Return the sha256 of all that decides how tokens act on each other: modules and settings, but no weights."""
    inside: list[str] = []
    modules = []
    for name, module in base.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        modules.append(f"{clean_name(name)} {type(whole_layer(module)).__qualname__}")
    prompts = [
        str(config.peft_type) for config in getattr(model, "peft_config", {}).values() if config.is_prompt_learning
    ]
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    attention = [
        str(getattr(module.config, "_attn_implementation", ""))
        for module in base.modules()
        if hasattr(module, "config")
    ]
    dtypes = sorted({str(parameter.dtype) for parameter in base.parameters()})
    mixed = "_original_forward" in vars(model)
    state = (device, autocast, mixed, has_scope(base))
    return sha256_of(configuration_of(base), json.dumps([modules, prompts, attention, dtypes]), str(state))


def _longest(base: nn.Module) -> int:
    """Return the number of tokens beyond which one sequence changes the RoPE frequencies of its whole batch."""
    found = [WITHOUT_LIMIT]
    for module in base.modules():
        if not isinstance(settings := getattr(getattr(module, "config", None), "rope_parameters", None), dict):
            continue
        # one RoPE for all layers, or one for each kind of layer
        for rope in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
            kind = str(rope.get("rope_type"))
            if kind == "longrope" or "dynamic" in kind:
                length = rope.get("original_max_position_embeddings") or max_length(base)
                found.append(length or WITHOUT_LIMIT)
    return min(found)


# ---------------------------------------------------------------------- layouts


def find_layout(
    model: nn.Module, plan: ForwardPlan, checks: ModelChecks, layouts: Sequence[Layout], longest: int
) -> ForwardPlan:
    """Return the plan with the first of some layouts that gives the model's own logits.

    Args:
        model: the model.
        plan: with its tail, its tree and its device.
        checks: of the model.
        layouts: in the order of preference. Without any of them edits run alone, which needs no check.
        longest: the number of tokens of the longest edit.
    """
    why = checks.why_alone(longest)
    if why is not None:
        logger.info("Edits run one at a time: %s.", why)
        return replace(plan, layout="single")
    for layout in layouts:
        if why_not_laid_out(model, replace(plan, layout=layout), checks) is None:
            return replace(plan, layout=layout)
    return replace(plan, layout="single")


def why_not_laid_out(model: nn.Module, plan: ForwardPlan, checks: ModelChecks) -> str | None:
    """Return why a plan's layout does not give the model's own logits; `None`: it does."""
    if plan.packed and has_scope(model):
        # nor is the base packed: its answers are compared with those of the model with the scope
        return "the model has a scope"
    words = {"packed": "packed edits", "padded": "padding without a mask", "masked": "padding"}

    def find() -> str | None:
        if plan.packed:
            inputs = {"input_ids": torch.tensor([checks.trial.rows[0]], device=plan.device), "use_cache": False}
            why = why_not_packed(model, plan.tail.layers, inputs, max_length(model) or WITHOUT_LIMIT)
            if why is not None:
                return why
        found = trial_logits(model, plan, checks.trial)
        why = checks.trial.why_not(found)
        if why is None and plan.packed and not checks.trial.is_float32:
            return _why_leaking(model, plan, checks.trial, found)
        return why

    return checks.once(("layout", plan.layout), lambda: checks.why_not(words[plan.layout], model, find))


def _why_leaking(model: nn.Module, plan: ForwardPlan, trial: Trial, found: Sequence[torch.Tensor]) -> str | None:
    """Return by how much the tokens of one packed sequence change the logits of others; `None`: not at all.

    In half precision, rounding can be larger than such a fault. Here, rounding is the same in both forwards.

    Args:
        model: the model, set up by `Trial.running`.
        plan: a packed plan.
        trial: the sequences.
        found: their logits in that plan.
    """
    other = replace(trial, rows=[*trial.rows[:-1], trial.rows[-1][::-1]])
    pairs = zip(trial_logits(model, plan, other)[:-1], found[:-1], strict=True)
    largest = max(deviation(*pair) for pair in pairs)
    return (
        None
        if largest <= SAME_SHAPE
        else f"packed sequences change each other's logits by {largest:.1g} of their spread"
    )


def trial_logits(model: nn.Module, plan: ForwardPlan, trial: Trial) -> list[torch.Tensor]:
    """Return the logits, (T, thinned V), of each made-up sequence, computed as a plan says.

    Args:
        model: the model, set up by `Trial.running`.
        plan: its `states`, if any, are of the trial's tree.
        trial: the sequences.
    """
    plan = replace(plan, tree=trial.tree, narrow=())
    everything = torch.arange(len(trial.rows))
    found = []
    for indices in everything.split(1 if plan.layout == "single" else len(trial.rows)):
        pack = plan.tree.pack(indices)
        rows = torch.repeat_interleave(torch.arange(len(indices)), pack.lengths)
        columns = torch.cat([torch.arange(length) for length in pack.lengths.tolist()])
        with torch.no_grad(), plan.applied(pack):
            where = plan.output_places(pack, rows.to(plan.device), columns.to(plan.device))
            logits = thinned(logits_at(model, *where, plan.inputs(pack)).logits)
        found += list(logits.split(pack.lengths.tolist()))
    return found


def find_narrow(model: nn.Module, plan: ForwardPlan, checks: ModelChecks) -> ForwardPlan:
    """Return a packed plan with the modules of the last layer that can do with the rows of the scored tokens."""
    trial = checks.trial
    # two sequences that share nothing
    indices = torch.tensor([len(trial.rows) - 2, len(trial.rows) - 1])
    on_trial = replace(plan, tree=trial.tree, states=None)
    pack = trial.tree.pack(indices)
    last = pack.slots[:, -1].to(plan.device)
    inputs = on_trial.inputs(pack)
    found: list[nn.Module] = []

    def logits() -> torch.Tensor:
        return logits_at(model, torch.zeros_like(last), last, inputs).logits

    def find() -> str | None:
        with on_trial.applied(pack):
            found.extend(find_narrowable(plan.tail.layers[-1], logits, last, min(checks.trial.bound, MOST_ROWWISE)))
        with replace(on_trial, narrow=tuple(found)).applied(pack, last):
            narrowed = thinned(logits())
        own = [checks.trial.expected[index][-1:] for index in indices.tolist()]
        return checks.trial.why_other(list(narrowed.split(1)), own)

    why = checks.why_not("narrowing its last layer", model, find)
    return replace(plan, narrow=tuple(found) if why is None else ())
