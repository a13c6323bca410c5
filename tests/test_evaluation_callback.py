"""Evaluations while training: the curves, the best epoch, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import EDITS, make_trainer, peft_model, trained
from tokenizers_for_tests import make_tokenizer
from transformers import TrainerCallback

from peft_locft import EvaluationCallback, EvaluationConfig, Probe, evaluate_edits, inspect_adapter

PROBED = [replace(edit, locality=(Probe("Dave is"),), rephrasings=(f"In France, {edit.prompt}",)) for edit in EDITS]
TOKEN_ACCURACY = EvaluationConfig(protocols=["token_accuracy"])


class Snapshots(TrainerCallback):
    """Keeps the trained weights of every epoch."""

    def __init__(self) -> None:
        self.of_epoch: dict[int, dict[str, torch.Tensor]] = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.of_epoch[round(state.epoch)] = trained(model)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let evaluations find these values of reliability_token_accuracy, in place of their own."""
    point, found = EvaluationCallback.__module__ + "._point", iter(values)

    def next_point(report: Any, state: Any) -> dict[str, float]:
        return {"epoch": state.epoch or 0, "reliability_token_accuracy": next(found)}

    monkeypatch.setattr(point, next_point)


def test_the_curves_hold_what_an_evaluation_finds(tmp_path: Path) -> None:
    callback = EvaluationCallback(PROBED, every=2)
    trainer = make_trainer(tmp_path, num_train_epochs=5, learning_rate=5e-2, callbacks=[callback])
    trainer.train()
    # before the first epoch, every second, and the last
    assert [point["epoch"] for point in callback.curves] == [0, 2, 4, 5]
    assert "loss" not in callback.curves[0]
    assert [point["loss"] for point in callback.curves[1:]] == [trainer.epoch_losses[n] for n in (1, 3, 4)]
    report = evaluate_edits(trainer.model, make_tokenizer("llama2"), PROBED)
    for name, value in callback.curves[-1].items():
        assert name in ("epoch", "loss") or value == report[name].after.value
    assert callback.curves[0]["locality_unchanged"] == 1.0
    assert callback.curves[-1]["reliability_token_accuracy"] > callback.curves[0]["reliability_token_accuracy"]
    assert json.loads((tmp_path / "evaluation_curves.json").read_text()) == callback.curves


def test_evaluating_changes_nothing_in_training(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    watched = make_trainer(tmp_path / "watched", callbacks=[EvaluationCallback(PROBED, every=1)])
    watched.train()
    assert watched.epoch_losses == plain.epoch_losses
    for name, tensor in trained(watched.model).items():
        assert torch.equal(tensor, trained(plain.model)[name])


@pytest.mark.parametrize("metric", ["reliability_token_accuracy", "perplexity"])
def test_training_ends_behind_the_best_epoch_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    sign = -1.0 if metric == "perplexity" else 1.0
    found = iter([sign * value for value in (0.9, 0.1, 0.5, 0.4, 0.5, 0.6)])

    def next_point(report: Any, state: Any) -> dict[str, float]:
        return {"epoch": state.epoch or 0, metric: next(found)}

    monkeypatch.setattr("peft_locft.training.evaluation_callback._point", next_point)
    text = "The capital of France is Paris. " * 20
    config = EvaluationConfig(protocols=["token_accuracy"], text_window=8)
    callback = EvaluationCallback(PROBED, 1, config, text=[text], best_metric=metric, patience=2)
    snapshots = Snapshots()
    trainer = make_trainer(tmp_path, num_train_epochs=9, callbacks=[callback, snapshots])
    trainer.train()
    # epoch 2 is the best: neither 3 nor 4, its equal, is better; before training is no epoch
    assert sorted(snapshots.of_epoch) == [1, 2, 3, 4]
    assert callback.best is callback.curves[2]
    for name, tensor in trained(trainer.model).items():
        assert torch.equal(tensor, snapshots.of_epoch[2][name])
        assert not torch.equal(tensor, snapshots.of_epoch[4][name])
    assert not (tmp_path / "best_epoch.safetensors").exists()


def test_a_run_that_gets_better_keeps_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.0, 0.1, 0.2, 0.3])
    snapshots = Snapshots()
    callback = EvaluationCallback(PROBED, 1, TOKEN_ACCURACY, best_metric="reliability_token_accuracy")
    trainer = make_trainer(tmp_path, callbacks=[callback, snapshots])
    trainer.train()
    for name, tensor in trained(trainer.model).items():
        assert torch.equal(tensor, snapshots.of_epoch[3][name])


def test_a_resumed_run_remembers_its_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def callback() -> EvaluationCallback:
        return EvaluationCallback(PROBED, 1, TOKEN_ACCURACY, best_metric="reliability_token_accuracy", patience=9)

    scripted(monkeypatch, [0.0, 0.8, 0.1, 0.2, 0.3])
    snapshots = Snapshots()

    class StopAfterTwo(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.epoch == 2:
                raise KeyboardInterrupt

    arguments: dict[str, Any] = {"num_train_epochs": 4, "save_strategy": "epoch"}
    first = make_trainer(tmp_path, callbacks=[callback(), snapshots, StopAfterTwo()], **arguments)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = callback()
    second = make_trainer(tmp_path, callbacks=[resumed], **arguments)
    second.train(resume_from_checkpoint=True)
    assert [point["epoch"] for point in resumed.curves] == [0, 1, 2, 3, 4]
    for name, tensor in trained(second.model).items():
        assert torch.equal(tensor, snapshots.of_epoch[1][name])


def test_the_curves_go_into_the_provenance_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.0, 0.5, 0.4, 0.3])
    callback = EvaluationCallback(PROBED, 1, TOKEN_ACCURACY, best_metric="reliability_token_accuracy", patience=9)
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    trainer.save_model()
    training = inspect_adapter(tmp_path).provenance.to_dict()["training"]
    assert training["curves"] == callback.curves
    assert training["best_epoch"] == 1


@pytest.mark.parametrize("arguments", [{"every": 0}, {"patience": 0}])
def test_counts_below_one_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"EvaluationCallback: found every=.*expected 1 or more"):
        EvaluationCallback(PROBED, **arguments)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("reliability", "best_metric='reliability': expected one of reliability_token_accuracy"),
        ("portability_token_accuracy", "no edit has portability probes"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_training(tmp_path: Path, metric: str, message: str) -> None:
    trainer = make_trainer(tmp_path, callbacks=[EvaluationCallback(PROBED, 1, TOKEN_ACCURACY, best_metric=metric)])
    before = trained(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(trainer.model).items())


def test_a_trunk_that_is_off_the_device_is_refused(tmp_path: Path) -> None:
    callback = EvaluationCallback(PROBED, 1)
    trainer = make_trainer(tmp_path, model=peft_model(), offload_trunk=True, callbacks=[callback])
    with pytest.raises(ValueError, match="Set offload_trunk=False, or evaluate after training"):
        trainer.train()
