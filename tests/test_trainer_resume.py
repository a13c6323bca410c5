import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tiny_models import assert_same_tensors
from tiny_training import EDITS, make_trainer, peft_model, trained
from transformers import TrainerCallback

from peft_locft import BreadthFirstTrainer

# a checkpoint at the end of every epoch, after every step (3 an epoch), after every second one, and so on
RECIPES: dict[str, dict[str, Any]] = {
    "epochs": {"save_strategy": "epoch", "per_device_train_batch_size": 3},
    "every_step": {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 3},
    "every_second_step": {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3},
    "one_step_an_epoch": {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 9},
    "accumulation": {
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
    },
    "depth_first": {
        "save_strategy": "steps",
        "save_steps": 2,
        "edit_order": "depth_first",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 1,
    },
    "schedule": {
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "optim": "adamw_torch",
    },
}
NUM_STEPS = 9


def edits_of(recipe: str) -> list[Any]:
    return {"one_step_an_epoch": EDITS[:4], "depth_first": EDITS[:3]}.get(recipe, EDITS)


def trainer_of(recipe: str, folder: Path, **arguments: Any) -> BreadthFirstTrainer:
    # every checkpoint stays: the tests look at earlier ones, too
    every = {"save_total_limit": None}
    return make_trainer(folder, peft_model(), edits_of(recipe), **(every | RECIPES[recipe] | arguments))


Outcome = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float], int]


def outcome(trainer: BreadthFirstTrainer) -> Outcome:
    """What a run leaves: weights, optimizer, losses, steps."""
    moments = trainer.optimizer.state_dict()["state"]
    optimizer = {
        f"{index}.{name}": torch.as_tensor(value) for index in moments for name, value in moments[index].items()
    }
    return trained(trainer.model), optimizer, trainer.epoch_losses, trainer.state.global_step


@cache
def undisturbed(recipe: str) -> Outcome:
    with TemporaryDirectory() as folder:
        trainer = trainer_of(recipe, Path(folder), save_strategy="no")
        trainer.train()
        return outcome(trainer)


def assert_as_undisturbed(trainer: BreadthFirstTrainer, expected: Outcome) -> None:
    found = outcome(trainer)
    assert_same_tensors(found[0], expected[0])
    assert_same_tensors(found[1], expected[1])
    assert found[2:] == expected[2:]


class Interrupt(TrainerCallback):
    """Breaks off as a kill would: before step `at`, or inside it where gradients accumulate."""

    def __init__(self, at: int, inside: bool = False) -> None:
        self.at, self.inside = at, inside

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and not self.inside:
            raise KeyboardInterrupt

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def interrupt(trainer: BreadthFirstTrainer, at: int, **arguments: Any) -> None:
    trainer.add_callback(Interrupt(at, **arguments))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize("at", [3, 4, 5, 8])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_resumed_is_as_never_interrupted(recipe: str, at: int, tmp_path: Path) -> None:
    interrupt(trainer_of(recipe, tmp_path), at)
    resumed = trainer_of(recipe, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == NUM_STEPS
    assert_as_undisturbed(resumed, undisturbed(recipe))


def test_interrupted_inside_a_step(tmp_path: Path) -> None:
    interrupt(trainer_of("accumulation", tmp_path), 5, inside=True)
    resumed = trainer_of("accumulation", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, undisturbed("accumulation"))


def test_interrupted_twice(tmp_path: Path) -> None:
    interrupt(trainer_of("every_step", tmp_path), 2)
    second = trainer_of("every_step", tmp_path)
    second.add_callback(Interrupt(7))
    with pytest.raises(KeyboardInterrupt):
        second.train(resume_from_checkpoint=True)
    resumed = trainer_of("every_step", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, undisturbed("every_step"))


def test_the_same_trainer_can_resume(tmp_path: Path) -> None:
    trainer = trainer_of("every_step", tmp_path)
    interrupt(trainer, 4)
    trainer.remove_callback(Interrupt)
    trainer.train(resume_from_checkpoint=True)
    assert_as_undisturbed(trainer, undisturbed("every_step"))


def test_a_named_checkpoint_is_taken(tmp_path: Path) -> None:
    trainer_of("every_step", tmp_path).train()
    resumed = trainer_of("every_step", tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_as_undisturbed(resumed, undisturbed("every_step"))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    trainer_of("every_step", tmp_path).train()
    resumed = trainer_of("every_step", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, undisturbed("every_step"))


@pytest.mark.parametrize("end", [{"loss_floor": 4.0}, {"stop_at_learned": 0.5}])
@pytest.mark.parametrize("strategy", [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 1}])
def test_resuming_a_run_that_what_it_learned_ended_changes_nothing(
    strategy: dict[str, Any], end: dict[str, Any], tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {"learning_rate": 3e-2, "num_train_epochs": 20} | end | strategy
    finished = make_trainer(tmp_path, peft_model(sharp=True), **recipe)
    finished.train()
    assert 1 < len(finished.epoch_losses) < 20, "it must be what ends it"
    resumed = make_trainer(tmp_path, peft_model(sharp=True), **recipe)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, outcome(finished))


@pytest.mark.parametrize("at", [2, 5, 8, 11])
def test_depth_first_resumes_inside_an_edit_that_is_done(at: int, tmp_path: Path) -> None:
    recipe: dict[str, Any] = RECIPES["depth_first"] | {"learning_rate": 6e-2, "loss_floor": 9.0, "num_train_epochs": 4}

    def make(folder: Path, **arguments: Any) -> BreadthFirstTrainer:
        return make_trainer(folder, peft_model(sharp=True), EDITS[:3], **(recipe | arguments))

    expected = make(tmp_path / "other", save_strategy="no")
    expected.train()
    assert all(loss < 9.0 for loss in expected.epoch_losses)
    interrupt(make(tmp_path), at)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, outcome(expected))


# ---------------------------------------------------------------------- checkpoints that are not whole


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1.0, "global_st'])
def test_a_half_written_checkpoint_is_passed_over(content: str | None, tmp_path: Path) -> None:
    interrupt(trainer_of("every_step", tmp_path), 5)
    state = tmp_path / "checkpoint-5" / "trainer_state.json"
    state.unlink()
    if content is not None:
        state.write_text(content)
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_bytes(b"half")
    resumed = trainer_of("every_step", tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_as_undisturbed(resumed, undisturbed("every_step"))


def test_a_checkpoint_that_is_being_replaced_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one's last file must not vouch for the new one."""
    trainer_of("every_step", tmp_path, seed=7).train()
    for newer in range(4, NUM_STEPS + 1):
        (tmp_path / f"checkpoint-{newer}" / "trainer_state.json").unlink()
    again = trainer_of("every_step", tmp_path)

    def killed(folder: str) -> None:
        if folder.endswith("checkpoint-3"):
            raise KeyboardInterrupt

    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert not (tmp_path / "checkpoint-3").exists()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    trainer = trainer_of("epochs", tmp_path)
    before = trained(trainer.model)
    with pytest.raises(ValueError, match=r"holds no complete checkpoint to resume from\. .*save_strategy='epoch'"):
        trainer.train(resume_from_checkpoint=True)
    assert_same_tensors(trained(trainer.model), before)


@pytest.mark.parametrize("make", [Path.mkdir, lambda folder: None], ids=["empty", "absent"])
def test_a_named_checkpoint_must_be_whole(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-3")
    with pytest.raises(
        ValueError, match=r"checkpoint-3 is no complete checkpoint: it has no readable trainer_state\.json"
    ):
        trainer_of("epochs", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_other_edits_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, edits=EDITS[:4], save_strategy="epoch").train()
    trainer = make_trainer(tmp_path, edits=EDITS[4:])
    with pytest.raises(ValueError, match=r"checkpoint-3 is of a run on 4 other edits.*is_trainable=True"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_holds_the_adapter_and_its_provenance(tmp_path: Path) -> None:
    trainer = trainer_of("every_step", tmp_path)
    trainer.train()
    files = {file.name for file in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "locft_provenance.json", "optimizer.pt"} <= files
    assert not {"training_args.bin", "adapter_model.bin"} & files
    facts = json.loads((tmp_path / "checkpoint-4" / "locft_provenance.json").read_text())
    assert facts["training"] == {"steps": 4, "epoch_losses": trainer.epoch_losses[:1]}
