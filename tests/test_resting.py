"""Edits that are learned sit out: their losses still count, and they come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same_tensors
from tiny_training import EDITS, make_trainer, peft_model, trained

from peft_locft.training.resting import RestingEdits

FAST: dict[str, Any] = {"learning_rate": 2e-2, "num_train_epochs": 12, "loss_floor": 0.5}


def test_an_edit_rests_so_many_epochs_with_the_loss_that_it_had() -> None:
    resting = RestingEdits(3, floor=0.5, epochs=2)
    resting.add(torch.tensor([0, 1]), torch.tensor([0.4, 1.0]), epoch=3)
    assert resting.split([2, 1, 0], 3) == ([2, 1], [0])
    assert resting.split([0, 1], 5) == ([1], [0])
    assert resting.split([0, 1], 6) == ([0, 1], [])
    assert resting.losses[0] == pytest.approx(0.4)
    restored = RestingEdits(3, floor=0.5, epochs=2)
    restored.restore(resting.state())
    assert restored.split([0, 1], 5) == ([1], [0])
    assert restored.losses[0] == pytest.approx(0.4)
    restored.restore({})
    assert restored.split([0, 1], 5) == ([0, 1], [])


def run(folder: Path, **arguments: Any) -> tuple[Any, int]:
    model = peft_model(sharp=True)
    rows = [0]
    model.get_base_model().model.layers[-1].register_forward_hook(
        lambda module, args, output: rows.__setitem__(0, rows[0] + output.shape[-2])
    )
    trainer = make_trainer(folder, model, **(FAST | arguments))
    trainer.train()
    return trainer, rows[0]


@pytest.mark.parametrize("averaging", ["edit", "token"])
def test_less_is_computed_and_about_the_same_learned(averaging: str, tmp_path: Path) -> None:
    every, all_rows = run(tmp_path, loss_averaging=averaging, max_steps=24)
    some, fewer_rows = run(tmp_path, loss_averaging=averaging, max_steps=24, skip_learned_epochs=3)
    assert fewer_rows < all_rows
    assert some.epoch_losses[0] == every.epoch_losses[0]
    assert len(some.epoch_losses) == len(every.epoch_losses)
    assert some.epoch_losses[-1] == pytest.approx(every.epoch_losses[-1], rel=0.1)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    arguments = {"skip_learned_epochs": 3, "save_strategy": "epoch"}
    whole, _ = run(tmp_path / "whole", **arguments)
    first = make_trainer(tmp_path / "cut", peft_model(sharp=True), **(FAST | arguments | {"num_train_epochs": 12}))
    first.train()
    middle = sorted((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[2]
    again = make_trainer(tmp_path / "cut", peft_model(sharp=True), **(FAST | arguments))
    again.train(resume_from_checkpoint=str(middle))
    assert again.epoch_losses == whole.epoch_losses
    assert_same_tensors(trained(again.model), trained(whole.model))


@pytest.mark.parametrize(
    "arguments", [{"skip_learned_epochs": -1}, {"skip_learned_epochs": 1, "edit_order": "depth_first"}]
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"skip_learned_epochs=-?1: expected 0 or more, and 0 for depth_first"):
        make_trainer(tmp_path, peft_model(), EDITS, **arguments)
