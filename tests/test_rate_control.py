"""Rates that turn out too high or too low are corrected while training."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer
from transformers import TrainerCallback, TrainerState

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EvaluationConfig,
    LearnedEdits,
    LocFTConfig,
    evaluate_edits,
)
from peft_locft.training.rate_control import LOWER, RateControl

WHERE = {"target_modules": "entire-layer", "layers_to_transform": [1]}


def trainer_for(relative_rate: float, model: PeftModel | None = None, **fields: Any) -> BreadthFirstTrainer:
    settings: dict[str, Any] = {"num_train_epochs": 12, "per_device_train_batch_size": 2, "loss_floor": 0.0} | fields
    args = BreadthFirstConfig(
        use_cpu=True, disable_tqdm=True, report_to="none", relative_learning_rate=relative_rate, **settings
    )
    model = model or get_peft_model(base_model(), LocFTConfig(**WHERE))  # type: ignore[arg-type]
    return BreadthFirstTrainer(model, args, EDITS, make_tokenizer("llama2"))


def control_of(trainer: BreadthFirstTrainer) -> RateControl:
    assert trainer.rate_control is not None
    return trainer.rate_control


def test_a_rate_that_learns_nothing_is_raised() -> None:
    trainer = trainer_for(1e-5)
    rate = max(trainer.rates.values())
    trainer.train()
    factor = control_of(trainer).state.factor
    assert factor >= 16
    assert max(group["lr"] for group in trainer.optimizer.param_groups) == pytest.approx(factor * rate)
    assert trainer.relative_rate == pytest.approx(1e-5 * factor)
    fixed = trainer_for(1e-5, learning_rate=rate)
    fixed.train()
    assert fixed.rate_control is None
    first, last = (each.epoch_losses[0] - each.epoch_losses[-1] for each in (fixed, trainer))
    assert last > 2 * first > 0


@pytest.mark.parametrize("relative_rate", [1e10])  # gives NaN
def test_a_rate_that_breaks_the_model_is_lowered_and_training_starts_again(relative_rate: float) -> None:
    trainer = trainer_for(relative_rate, num_train_epochs=20)
    deltas: list[float] = []

    class Sees(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = [each for each in kwargs["model"].parameters() if each.requires_grad]
            deltas.append(max(float(each.detach().abs().max()) for each in trained))

    trainer.add_callback(Sees())
    trainer.train()
    state = control_of(trainer).state
    assert state.factor <= LOWER and not state.may_raise
    assert deltas.count(0.0) >= 1  # it was put back
    assert all(map(math.isfinite, trainer.epoch_losses))


def test_a_rate_that_is_high_enough_is_not_raised() -> None:
    trainer = trainer_for(300.0)  # where this model's norms hide how far off its weights are, the loss only stays
    trainer.train()
    assert control_of(trainer).state.factor <= 1


def test_what_was_there_before_is_put_back() -> None:
    model = get_peft_model(base_model(), LocFTConfig(**WHERE))  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 1e-3)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer = trainer_for(1e10, model, max_steps=2)  # the second step finds what the first one did
    trainer.train()
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


def test_a_resumed_run_has_the_same_rate_and_the_same_bits(tmp_path: Path) -> None:
    whole = trainer_for(1e-5, output_dir=str(tmp_path / "a"), save_strategy="epoch", save_total_limit=None)
    whole.train()
    factors = control_of(whole).state.factor
    resumed = trainer_for(1e-5, output_dir=str(tmp_path / "b"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-24"))
    assert control_of(resumed).state.factor == factors > 1
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.epoch_losses == whole.epoch_losses


def test_learned_edits_are_those_with_greedy_answers() -> None:
    sharp = get_peft_model(base_model(sharp=True), LocFTConfig(**WHERE))  # type: ignore[arg-type]
    trainer = trainer_for(0.1, sharp, num_train_epochs=60, loss_floor=1e-2)
    assert trainer.learned is None
    trainer.train()
    assert trainer.learned is not None
    # as an evaluation that looks at every token of the targets
    protocols = EvaluationConfig(protocols=["token_accuracy"])
    rows = evaluate_edits(trainer.model, trainer.processing_class, EDITS, protocols, progress=False).rows
    missed = [edit.prompt for edit, row in zip(EDITS, rows, strict=True) if row["token_accuracy_after"] < 1]
    assert [edit.prompt for edit in trainer.learned.unlearned] == missed
    assert trainer.learned.num_learned == len(EDITS) - len(missed) > len(EDITS) / 2
    assert str(trainer.learned).startswith(f"learned {len(EDITS) - len(missed)} of {len(EDITS)} edits")


def test_contradicting_edits_are_counted() -> None:
    edits = [*EDITS[:2], Edit(EDITS[0].prompt, "Rome"), Edit(EDITS[0].prompt, "Oslo")]
    learned = LearnedEdits.of(edits, [True, True, False, False], [-0.1, 0.0, -3.0, -4.0])
    assert (learned.num_contradicted, learned.reliability, learned.is_enough) == (2, 0.5, True)
    named = f'"{EDITS[0].prompt}" → "Rome", "{EDITS[0].prompt}" → "Oslo"'
    lines = str(learned).splitlines()
    assert lines[0] == f"learned 2 of 4 edits (2 not: {named}); median probability of a target: 0.477"
    assert lines[1].startswith("2 edits contradict others: their prompt has several targets, of which the model can")
    assert not LearnedEdits.of(EDITS[:2], [True, False], [0.0, -1.0]).is_enough


def factors_of(losses: list[float], first_loss: float = 4.0) -> list[float]:
    """Return the factor of the rate after each epoch of five steps that have this loss."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    history = SimpleNamespace(step_loss=0.0)
    control: Any = RateControl(history, 0.025)  # type: ignore[arg-type]
    control.remember(model)
    state = TrainerState()
    control.on_train_begin(None, state, None)
    control.state.first_loss = first_loss
    factors = []
    for epoch, loss in enumerate(losses, start=1):
        history.step_loss = loss
        for step in range(5):
            state.epoch = epoch - 1 + (step + 1) / 5
            control.on_step_end(None, state, None, model=model, optimizer=optimizer, lr_scheduler=scheduler)
        factors.append(control.state.factor)
        assert optimizer.param_groups[0]["lr"] == factors[-1]
    return factors


def test_a_loss_that_stays_where_it_is_halves_the_rate() -> None:
    assert factors_of([3.0, 1.0, 1.0, 0.98, 0.97, 1.0, 0.9]) == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


def test_the_rate_is_halved_three_times_at_most() -> None:
    assert factors_of([3.0, *[1.0] * 20])[-1] == 1 / 8


def test_a_loss_that_falls_keeps_its_rate() -> None:
    assert set(factors_of([4.0 * 0.9**epoch for epoch in range(30)])) == {1}
    # one step back is no stall
    assert set(factors_of([3.0, 1.0, 1.1, 0.8, 0.85, 0.6])) == {1}
