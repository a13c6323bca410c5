"""An adapter on a fine-tuned descendant of its base: how far that has moved, which edits survive, and a verdict."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from ..adapters.edited_parameters import Term, base_to_compare, deltas_of, terms_of
from ..adapters.reading import check_adapter
from ..adapters.shipped_edits import adapter_edits
from ..data.edit_types import without_questions
from ..data.edits import EditSource, read_edits
from ..evaluation.config import EvaluationConfig
from ..evaluation.report import EvaluationReport
from ..evaluation.tables import markdown_table
from ..io.arithmetic import one_thread
from ..io.checkpoint import Checkpoint
from ..io.parameter_names import ParameterFinder
from .evaluate import evaluate_model

SURVIVES, LOST = 0.95, 0.5  # shares of the edits that were learned


@dataclass(frozen=True, slots=True)
class WeightChange:
    """What fine-tuning did to a weight that an adapter edits.

    Attributes:
        name: the weight.
        edit_size: `|delta| / |W|`, of the descendant's weight W.
        change: `|W - W0| / |W0|`, where W0 is the weight of the training; `None` if that model is not at hand.
        cosine: between `W - W0` and the delta: -1 if the fine-tuning undid the edit, 0 if it did not touch it.
    """

    name: str
    edit_size: float
    change: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What an adapter does on a descendant of its base.

    Attributes:
        adapter: the adapter.
        model: the descendant.
        changes: of each edited weight.
        report: the evaluation of the descendant with the adapter; its values before are those of the descendant.
        learned: share of the edits that the model of the training had learned; 1 if it is not recorded.
    """

    adapter: str
    model: str
    changes: list[WeightChange]
    report: EvaluationReport
    learned: float = 1.0

    @property
    def survived(self) -> float:
        """Share of the learned edits that the descendant answers."""
        return self.report.results["reliability_exact_match"].after.value / self.learned

    @property
    def verdict(self) -> str:
        """What to do, in a sentence."""
        if self.survived >= SURVIVES:
            return (
                "The edits survive: load the adapter, or merge it with --force. What it does to other answers is in "
                "the evaluation."
            )
        if self.survived >= LOST:
            return (
                "The edits survive in part: train them again on this model, or use the adapter only for the edits "
                "that are answered."
            )
        return "The edits do not survive: train them again on this model."

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        rows = [[each.name, number(each.edit_size), number(each.change), number(each.cosine)] for each in self.changes]
        table = markdown_table(["weight", "size of the edit", "change of the base", "cosine"], rows)
        before = self.report.results["reliability_exact_match"].before
        without = "" if before is None else f" ({before.value:.3f} without the adapter)"
        answered = self.report.results["reliability_exact_match"].after.value
        return f"{table}\n\n{answered:.3f} of the edits are answered{without}.\n{self.verdict}"


def transfer_adapter(
    adapter: str | os.PathLike[str],
    model: str | os.PathLike[str],
    edits: EditSource | None = None,
    *,
    base_model: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
) -> TransferReport:
    """Say what an adapter does on a model that was fine-tuned from its base after the adapter was made.

    Args:
        adapter: a local LocFT adapter folder.
        model: the descendant, a folder or a name on the Hub, in safetensors.
        edits: the edits to ask, anything that `read_edits` reads, with their rephrasings and locality probes if they
            have any; `None`: those that the adapter ships.
        base_model: the model of the training, to compare with; `None`: the one that the adapter names, if it is on
            this machine.
        output_dir: folder for the evaluation; `None`: do not save it.
        dtype: as in `evaluate_model`.

    Raises:
        ValueError: if the adapter is refused or ships no edits and none are given; if the model lacks a weight that it
            edits, or has it in another shape.
        OSError: if a model cannot be loaded.

    Example:
        >>> from peft_locft.workflows import transfer_adapter
        >>> print(transfer_adapter("out", "my-fine-tuned-model"))
    """
    checked = check_adapter(adapter)
    asked = read_edits(edits) if edits is not None else [without_questions(edit) for edit in adapter_edits(adapter)]
    base = base_to_compare(base_model, [checked])
    descendant = ParameterFinder(Checkpoint(model))
    original = None if base is None else ParameterFinder(base)
    with one_thread():
        changes = [_change(term, descendant, original) for term in terms_of([checked])]
    args = EvaluationConfig(protocols=["generation"], allow_other_base=True)
    report = evaluate_model(
        str(model), asked, args, adapter=adapter, output_dir=output_dir, dtype=dtype, overwrite_output_dir=False
    )
    run = checked.provenance.run
    recorded = None if run is None else run.training.learned
    learned = recorded["num_learned"] / recorded["num_edits"] if recorded else 1.0
    return TransferReport(str(adapter), str(model), changes, report, learned or 1.0)


def _change(term: Term, descendant: ParameterFinder, original: ParameterFinder | None) -> WeightChange:
    weight = descendant.find(term.name, term.delta.shape).read().double()
    ((values, scale),) = deltas_of([term], 0, term.delta.num_values)
    delta = scale * values.double().reshape(term.delta.shape)
    found = WeightChange(term.name, float(delta.norm() / weight.norm()))
    if original is None:
        return found
    before = original.find(term.name, term.delta.shape).read().double()
    moved = weight - before
    cosine = torch.nn.functional.cosine_similarity(moved.flatten(), delta.flatten(), dim=0)
    return replace(found, change=float(moved.norm() / before.norm()), cosine=float(cosine))
