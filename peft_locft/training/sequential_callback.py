"""Evaluates a depth-first run after 10, 100 and 1,000 edits: the curve of sequential editing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..data.edits import Edit
from ..data.texts import TextSource
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.report import EvaluationReport
from ..evaluation.summary import deciding_score
from ..io.files import write_atomically
from .evaluation_callback import as_trained

SEQUENTIAL_KEY = "SequentialEvaluationCallback"
SEQUENTIAL_NAME = "sequential_curve"
OF_FIRST = "reliability_of_first_edits"


class SequentialEvaluationCallback(TrainerCallback):
    """Evaluates a depth-first run after some numbers of edits, on all edits so far.

    Each evaluation writes `sequential_curve.json` and, with `draw`, `sequential_curve.png` to `args.output_dir`.

    A breadth-first run trains all edits together, so it has no state after 10 edits and is refused. Its curve comes
    from trainings on the first 10, 100 and 1,000 edits, or from an adapter that is updated: evaluate each, and compare
    the reports (`compare_reports`, `locft compare`), which draws the same curve.

    Args:
        edits: the edits of the training, in its order, with rephrasings and probes.
        after: numbers of edits; larger ones than there are count as all, and after all is always evaluated.
        args: the evaluation; the default computes no probabilities.
        text: for perplexity and KL, see `evaluate_edits`.
        draw: draws the curve to a file, such as `functools.partial(draw_curves, by="num_edits")`; `None`: no picture.

    Attributes:
        curve: one dictionary per evaluation: `num_edits`, the value of every metric on the edits so far, and
            `reliability_of_first_edits`: the share of the edits of the first evaluation that the model still answers.

    Raises:
        ValueError: if a number in `after` is below 1; when training begins, if the run is not depth-first, or trains
            another number of edits.

    Example:
        >>> callback = SequentialEvaluationCallback(edits, after=(10, 100, 1000))
        >>> args = BreadthFirstConfig(output_dir="out", edit_order="depth_first", per_device_train_batch_size=1)
        >>> BreadthFirstTrainer(model, args, train_dataset=edits, processing_class=tokenizer, callbacks=[callback])
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        after: Sequence[int] = (10, 100, 1000),
        args: EvaluationConfig | None = None,
        *,
        text: TextSource | None = None,
        draw: Callable[[Sequence[Mapping[str, float]], Path], None] | None = None,
    ) -> None:
        if not after or min(after) < 1:
            raise ValueError(f"SequentialEvaluationCallback: found after={after!r}; expected numbers of 1 or more.")
        self.edits = list(edits)
        self.after = sorted({min(number, len(self.edits)) for number in after} | {len(self.edits)})
        self.args = args or EvaluationConfig(protocols=["generation", "token_accuracy"])
        self.text = text
        self.draw = draw
        self.curve: list[dict[str, float]] = []

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if getattr(args, "steps_per_edit", None) is None:
            raise ValueError(
                "SequentialEvaluationCallback: found a breadth-first run, which trains all edits together and has no "
                "state after 10 of them. Train on the first 10, 100, … edits one after the other, evaluate each, and "
                'compare the reports; or train with edit_order="depth_first".'
            )
        num_trained = train_dataloader.batch_sampler.num_edits
        if num_trained != len(self.edits):
            raise ValueError(
                f"SequentialEvaluationCallback: found {len(self.edits)} edits and a training on {num_trained}; "
                "expected the edits of the training, in its order."
            )
        self.args = as_trained(self.args, args)
        self.curve = list(state.stateful_callbacks.get(SEQUENTIAL_KEY, {}).get("curve", []))  # of a resumed run

    def on_step_end(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        num_edits, rest = divmod(state.global_step, args.steps_per_edit)
        if rest or num_edits not in self.after:
            return
        self.curve.append(self._point(model, processing_class, num_edits, not args.disable_tqdm))
        state.stateful_callbacks[SEQUENTIAL_KEY] = {"curve": self.curve}
        if args.output_dir is not None and state.is_world_process_zero:
            write_atomically(Path(args.output_dir, f"{SEQUENTIAL_NAME}.json"), json.dumps(self.curve, indent=1) + "\n")
            if self.draw is not None and len(self.curve) > 1:
                self.draw(self.curve, Path(args.output_dir, f"{SEQUENTIAL_NAME}.png"))

    def _point(self, model: nn.Module, tokenizer: Any, num_edits: int, progress: bool) -> dict[str, float]:
        edits = self.edits[:num_edits]
        report = EditEvaluator(model, tokenizer, edits, self.args, text=self.text, progress=progress).evaluate()
        values = {name: result.after.value for name, result in report.results.items()}
        return {"num_edits": float(num_edits)} | values | _of_first(report, self.after[0])


def _of_first(report: EvaluationReport, num_first: int) -> dict[str, float]:
    """Return the reliability of the first edits; nothing if it was not scored."""
    own = [row for row in report.rows if row["kind"] == "reliability" and row["edit"] < num_first]
    scores = [deciding[1] for row in own if (deciding := deciding_score(row)) is not None]
    return {OF_FIRST: float(np.mean(scores))} if scores else {}
