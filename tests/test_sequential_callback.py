"""The curve of a depth-first run after some numbers of edits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_training import EDITS, make_trainer, trained
from tokenizers_for_tests import make_tokenizer
from transformers import TrainerCallback

from peft_locft import evaluate_edits
from peft_locft.evaluation.summary import deciding_score
from peft_locft.reporting import draw_curves
from peft_locft.training import SequentialEvaluationCallback

DEPTH_FIRST: dict[str, Any] = {
    "edit_order": "depth_first",
    "per_device_train_batch_size": 1,
    "num_train_epochs": 2,
    "learning_rate": 5e-2,
}


class ReportAfterThree(TrainerCallback):
    """Evaluates the first three edits when they were trained, and the others were not."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3 * 2:
            self.report = evaluate_edits(model, make_tokenizer("llama2"), EDITS[:3])


def test_the_curve_is_of_all_edits_so_far(tmp_path: Path) -> None:
    callback, reference = SequentialEvaluationCallback(EDITS, after=(3, 5, 1000)), ReportAfterThree()
    trainer = make_trainer(tmp_path, callbacks=[callback, reference], **DEPTH_FIRST)
    trainer.train()
    assert [point["num_edits"] for point in callback.curve] == [3, 5, len(EDITS)]
    for name, value in callback.curve[0].items():
        if name in reference.report.results:
            assert value == reference.report[name].after.value
    at_the_end = evaluate_edits(trainer.model, make_tokenizer("llama2"), EDITS)
    assert callback.curve[-1]["reliability_token_accuracy"] == at_the_end["reliability_token_accuracy"].after.value
    first = [deciding_score(row) for row in at_the_end.rows if row["kind"] == "reliability" and row["edit"] < 3]
    assert callback.curve[-1]["reliability_of_first_edits"] == sum(score for _, score in filter(None, first)) / 3
    assert json.loads((tmp_path / "sequential_curve.json").read_text()) == callback.curve
    assert not (tmp_path / "sequential_curve.png").exists()


def test_evaluating_changes_nothing_and_the_curve_is_drawn(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", **DEPTH_FIRST)
    plain.train()
    draw = partial(draw_curves, by="num_edits")
    callback = SequentialEvaluationCallback(EDITS, after=[2], draw=draw)
    watched = make_trainer(tmp_path / "watched", callbacks=[callback], **DEPTH_FIRST)
    watched.train()
    weights = trained(plain.model)
    assert all((tensor == weights[name]).all() for name, tensor in trained(watched.model).items())
    assert (tmp_path / "watched" / "sequential_curve.png").stat().st_size > 0


def test_a_breadth_first_run_has_no_such_curve(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SequentialEvaluationCallback(EDITS)])
    with pytest.raises(
        ValueError, match=r"found a breadth-first run, .*no state after 10 of them\. Train on the first"
    ):
        trainer.train()


def test_other_edits_than_those_of_the_training_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[SequentialEvaluationCallback(EDITS[:3])], **DEPTH_FIRST)
    with pytest.raises(ValueError, match="found 3 edits and a training on 8"):
        trainer.train()


@pytest.mark.parametrize("after", [(), (0, 10)])
def test_numbers_below_one_are_refused(after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"found after=.*expected numbers of 1 or more"):
        SequentialEvaluationCallback(EDITS, after)
