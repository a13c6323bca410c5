import json
import math
import pickle
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, assert_same_tensors, base_state, changed, every_family
from tiny_training import EDITS, base_model, make_trainer, peft_model, trained
from tokenizers_for_tests import make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, Edit, LocFTConfig, encode_edits
from peft_locft.training.batches import EditBatches
from peft_locft.training.callbacks import LossFloorCallback
from peft_locft.training.edit_runner import MicroBatch
from peft_locft.training.learned import LearnedEdits
from peft_locft.training.loss_history import LossHistory
from peft_locft.training.preserver import PreservationCallback
from peft_locft.training.row_losses import RowLosses

LOCATION = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")


def minus_log_p(model: nn.Module, input_ids: torch.Tensor, start: int, objective: str) -> torch.Tensor:
    """-log p of every scored token of one edit, without padding."""
    log_p = torch.log_softmax(model(input_ids[None]).logits[0].float(), dim=-1)
    first = 1 if objective == "full" else start
    places = range(first, len(input_ids))
    sources = [start - 1 if objective == "prompt_last" else place - 1 for place in places]
    return -log_p[sources, input_ids[first:]]


def plain_loop(
    *,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    floor: float = 0.0,
    objective: str = "target_new",
    averaging: str = "edit",
    append_eos: bool = True,
    sharp: bool = False,
) -> list[float]:
    """Train the base weight itself, edit by edit, with torch.optim.Adam: nothing of the trainer, the tuner or Trainer.

    The order alone is the package's, and has its own tests.
    """
    model = base_model(sharp=sharp).requires_grad_(False)
    weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    encoded = encode_edits(EDITS, make_tokenizer("llama2"), append_eos=append_eos)
    order = EditBatches(len(EDITS), batch_size, seed=42)
    epoch_losses = []
    for order.epoch in range(num_epochs):
        total = 0.0
        for batch in order:
            edits = [encoded[index] for index in batch]
            losses = [minus_log_p(model, edit.input_ids, edit.target_start, objective) for edit in edits]
            per_edit = torch.stack([each.mean() for each in losses]).mean()
            loss = per_edit if averaging == "edit" else torch.cat(losses).mean()
            total += loss.item() * len(batch)
            if loss.item() >= floor:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        epoch_losses.append(total / len(EDITS))
        if epoch_losses[-1] < floor:
            break
    return epoch_losses


class Spy(TrainerCallback):
    """Keeps what the trainer tells its callbacks."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.num_moments: list[int] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(trained(model))
        self.num_moments.append(len(kwargs["optimizer"].state))


# ---------------------------------------------------------------------- what is trained


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_family_learns_and_nothing_but_the_delta_changes(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = peft_model(family, dtype=dtype)
    base = base_state(model)
    trainer = make_trainer(tmp_path, model, num_train_epochs=5, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.epoch_losses[-1] < trainer.epoch_losses[0] - 0.1
    assert_same_tensors(base_state(model), base)
    assert all(delta.any() and delta.dtype == torch.float32 for delta in trained(model).values())


@pytest.mark.parametrize("averaging", ["edit", "token"])
@pytest.mark.parametrize("objective", ["target_new", "prompt_last", "full"])
def test_losses_are_those_of_a_plain_loop(objective: str, averaging: str, tmp_path: Path) -> None:
    model = peft_model(config=LOCATION)
    trainer = make_trainer(
        tmp_path, model, objective=objective, loss_averaging=averaging, per_device_train_batch_size=3
    )
    trainer.train()
    expected = plain_loop(num_epochs=3, batch_size=3, learning_rate=5e-3, objective=objective, averaging=averaging)
    assert trainer.epoch_losses == pytest.approx(expected, rel=1e-5)


def test_without_eos_the_target_alone_is_scored(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, peft_model(config=LOCATION), append_eos=False)
    trainer.train()
    expected = plain_loop(num_epochs=3, batch_size=4, learning_rate=5e-3, append_eos=False)
    assert trainer.epoch_losses == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(plain_loop(num_epochs=3, batch_size=4, learning_rate=5e-3), rel=1e-3)


def test_the_defaults_are_the_published_recipe() -> None:
    args = BreadthFirstConfig(use_cpu=True)
    assert (args.learning_rate, args.num_train_epochs, args.per_device_train_batch_size) == ("auto", 50, None)
    assert (args.loss_floor, args.weight_decay, args.max_grad_norm, args.warmup_steps) == (1e-2, 0, 0, 0)
    assert (args.objective, args.loss_averaging, args.edit_order) == ("target_new", "edit", "breadth_first")
    assert (args.lr_scheduler_type, args.append_eos, args.chat_template) == ("constant", True, "auto")


def test_every_edit_is_trained_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=3)
    seen: list[tuple[int, ...]] = []
    own = RowLosses.__call__

    def spy(losses: RowLosses, model: Any, batch: MicroBatch) -> Any:
        seen.extend(tuple(trainer.train_dataset[index].input_ids.tolist()) for index in batch.indices.tolist())
        return own(losses, model, batch)

    monkeypatch.setattr(RowLosses, "__call__", spy)
    trainer.train()
    encoded = encode_edits(EDITS, make_tokenizer("llama2"))
    expected = Counter(tuple(encoded[index].input_ids.tolist()) for index in range(len(EDITS)))
    epochs = [seen[begin : begin + len(EDITS)] for begin in range(0, len(seen), len(EDITS))]
    assert [Counter(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_dataset_trains_as_the_list_of_edits_does(tmp_path: Path) -> None:
    import datasets

    records = [{"prompt": edit.prompt, "target_new": edit.target} for edit in EDITS]
    trainers = [
        make_trainer(tmp_path, edits=EDITS),
        BreadthFirstTrainer(
            model=peft_model(),
            args=make_trainer(tmp_path).args,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=make_tokenizer("llama2"),
        ),
    ]
    for trainer in trainers:
        trainer.train()
    assert trainers[0].epoch_losses == trainers[1].epoch_losses


def test_a_chat_template_is_used_where_it_is_asked_for(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen", chat_template="chatml")
    plain, chat = (make_trainer(tmp_path, tokenizer=tokenizer, chat_template=chat) for chat in (False, True))
    assert tokenizer.decode(chat.train_dataset[0].input_ids).startswith("<|im_start|>user\nThe capital of France is")
    assert tokenizer.decode(plain.train_dataset[0].input_ids).startswith("The capital of France is")
    chat.train()
    assert chat.epoch_losses[-1] < chat.epoch_losses[0]


def test_lora_trains_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft_model(config=LoraConfig(task_type="CAUSAL_LM", target_modules=["down_proj"], lora_dropout=0.5))
    base = base_state(model)
    trainer = make_trainer(tmp_path, model, learning_rate=2e-2, num_train_epochs=5)
    trainer.train()
    assert trainer.epoch_losses[-1] < trainer.epoch_losses[0] - 0.1
    assert all("lora_" in name for name in changed(base_state(model), base))
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert_same_tensors(base_state(reloaded), base_state(model))


class ScaledLossTrainer(BreadthFirstTrainer):
    """Overrides the loss, as subclasses of `transformers.Trainer` do."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, **kwargs)
        return 0 * loss, outputs


def test_a_subclass_may_override_the_loss(tmp_path: Path) -> None:
    model = peft_model()
    plain = make_trainer(tmp_path, model)
    before = trained(model)
    trainer = ScaledLossTrainer(
        model=model, args=plain.args, train_dataset=list(EDITS), processing_class=plain.processing_class
    )
    trainer.train()
    assert_same_tensors(trained(model), before)
    assert trainer.epoch_losses[0] > 0  # what is recorded is the loss of the edits


def test_a_plain_model_with_unfrozen_weights_trains_too(tmp_path: Path) -> None:
    model = base_model().requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_()
    before = base_state(model)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert trainer.epoch_losses == pytest.approx(plain_loop(num_epochs=3, batch_size=4, learning_rate=5e-3), rel=1e-5)
    assert changed(base_state(model), before) == {"model.layers.1.mlp.down_proj.weight"}
    trainer.save_model()
    assert_same_tensors(base_state(AutoModelForCausalLM.from_pretrained(tmp_path)), base_state(model))


# ---------------------------------------------------------------------- seeds, batches, modes


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        model = peft_model()
        make_trainer(tmp_path, model, seed=seed).train()
        weights.append(trained(model))
    assert_same_tensors(weights[0], weights[1])
    assert changed(weights[0], weights[2])


@pytest.mark.parametrize("averaging", ["edit", "token"])
def test_accumulated_gradients_are_those_of_one_larger_batch(averaging: str, tmp_path: Path) -> None:
    """With 7 edits the last step of an epoch has 3, in batches of 2 and of 1."""
    models = [peft_model(), peft_model()]
    sizes = [(4, 1), (2, 2)]
    trainers = [
        make_trainer(
            tmp_path,
            model,
            EDITS[:7],
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            loss_averaging=averaging,
        )
        for model, (batch_size, steps) in zip(models, sizes, strict=True)
    ]
    for trainer in trainers:
        trainer.train()
    assert [trainer.state.global_step for trainer in trainers] == [6, 6]
    assert trainers[1].epoch_losses == pytest.approx(trainers[0].epoch_losses, rel=1e-6)
    for one, other in zip(trained(models[0]).values(), trained(models[1]).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


DROPOUTS = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
}


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_and_checkpointing_changes_no_loss(family: str, checkpointing: bool, tmp_path: Path) -> None:
    dropout = DROPOUTS.get(family, {"attention_dropout": 0.5})
    none = dict.fromkeys(dropout, 0.0)
    one, other = peft_model(family, **none), peft_model(family, **dropout).train()
    plain = make_trainer(tmp_path, one)
    plain.train()
    trainer = make_trainer(tmp_path, other, activation_checkpointing=checkpointing)
    trainer.train()
    assert trainer.epoch_losses == plain.epoch_losses
    assert_same_tensors(trained(other), trained(one))
    assert trainer.compute_loss(other, range(4)).item() == trainer.compute_loss(other, range(4)).item()


@every_family
def test_checkpointing_recomputes_the_layers(family: str, tmp_path: Path) -> None:
    num_forwards = []
    for checkpointing in (False, True):
        model = peft_model(family)
        norms = [module for name, module in model.named_modules() if "norm" in name.rpartition(".")[2] or "ln" in name]
        counter: Counter[str] = Counter()
        for norm in norms:
            norm.register_forward_hook(lambda *_, counter=counter: counter.update(["forward"]))
        make_trainer(tmp_path, model, num_train_epochs=1, activation_checkpointing=checkpointing).train()
        num_forwards.append(counter["forward"])
    assert num_forwards[1] > num_forwards[0] > 0


@pytest.mark.skipif(
    not hasattr(BreadthFirstConfig, "activation_checkpointing"), reason="transformers before 5.23 has the older name"
)
def test_the_older_name_of_checkpointing_works_too(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
        trainer = make_trainer(tmp_path, gradient_checkpointing=True)
    trainer.train()
    plain = make_trainer(tmp_path)
    plain.train()
    assert trainer.epoch_losses == plain.epoch_losses


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_caller_handed_over_stays_as_it_is(family: str, tmp_path: Path) -> None:
    model, tokenizer, edits = peft_model(family), make_tokenizer("gpt2"), list(EDITS)
    tokenizer.padding_side, tokenizer.model_max_length = "left", 7

    def state() -> tuple[Any, ...]:
        written = tmp_path / "tokenizer"
        tokenizer.save_pretrained(written)
        files = {file.name: file.read_bytes() for file in written.iterdir()}
        configs = model.config.to_dict(), model.config.use_cache, model.generation_config.to_dict()
        return files, tokenizer.padding_side, pickle.dumps(edits), json.dumps(configs, default=str)

    before = state()
    trainer = make_trainer(tmp_path, model, edits, tokenizer=tokenizer, activation_checkpointing=True)
    assert state() == before
    trainer.train()
    trainer.save_model()
    assert state() == before


# ---------------------------------------------------------------------- several processes


# the last batch of an epoch is uneven; or leaves one process without an edit; a floor that some batches fall below
RECIPES: list[dict[str, Any]] = [
    {"num_edits": 7, "per_device_train_batch_size": 2},
    {"num_edits": 5, "per_device_train_batch_size": 2, "loss_averaging": "token"},
    {"num_edits": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    {"num_edits": 8, "per_device_train_batch_size": 1, "learning_rate": 3e-2, "loss_floor": 9.0},
    {"num_edits": 2, "per_device_train_batch_size": 1, "edit_order": "depth_first"},
]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    model_folder = tmp_path / "model"
    base_model().save_pretrained(model_folder)
    make_tokenizer("llama2").save_pretrained(model_folder)
    records = [{"prompt": edit.prompt, "target": edit.target} for edit in EDITS]
    (tmp_path / "edits.json").write_text(json.dumps(records))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(script), str(port), str(model_folder), str(tmp_path), json.dumps(RECIPES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    for recipe, found in zip(RECIPES, results[0], strict=True):
        own = dict(recipe)
        model, edits = peft_model(sharp=True), EDITS[: own.pop("num_edits")]
        if "edit_order" not in own:
            own["per_device_train_batch_size"] *= 2
        trainer = make_trainer(tmp_path, model, edits, **own)
        trainer.train()
        assert found["losses"] == pytest.approx(trainer.epoch_losses, rel=1e-5)
        (delta,) = trained(model).values()
        assert found["delta"] == pytest.approx(delta.flatten().tolist(), abs=1e-5)
    printed = [(tmp_path / f"printed-{rank}.txt").read_text() for rank in (0, 1)]
    assert "AutoPeftModelForCausalLM" in printed[0] and printed[1] == ""
    assert json.loads((tmp_path / "adapter" / "locft_provenance.json").read_text())["recipe"]["world_size"] == 2


# ---------------------------------------------------------------------- the end


@pytest.mark.parametrize("averaging", ["edit", "token"])
def test_training_stops_when_enough_edits_are_learned(averaging: str, tmp_path: Path) -> None:
    model = peft_model(sharp=True)
    recipe: dict[str, Any] = {"learning_rate": 3e-2, "loss_averaging": averaging, "num_train_epochs": 40}
    trainer = make_trainer(tmp_path, model, stop_at_learned=0.75, **recipe)
    trainer.train()
    assert 1 < len(trainer.epoch_losses) < 40
    assert trainer.loss_history.unlearned[-1] <= 2 < min(trainer.loss_history.unlearned[:-1])
    standing_still = make_trainer(tmp_path, model, learning_rate=0.0, num_train_epochs=1)
    standing_still.train()
    nats = []
    for edit in map(standing_still.train_dataset.__getitem__, range(len(EDITS))):
        with torch.no_grad():
            log_probs = model(input_ids=edit.input_ids[None]).logits[0].log_softmax(-1)
        targets = range(edit.target_start, len(edit.input_ids))
        nats.append(-sum(float(log_probs[place - 1, edit.input_ids[place]]) for place in targets))
    assert standing_still.loss_history.unlearned == [sum(each >= math.log(2) for each in nats)]


@pytest.mark.parametrize(("share", "num_edits"), [(0.9, 10), (0.55, 20), (0.7, 10), (0.98, 50)])
def test_so_many_as_are_asked_for_are_enough(share: float, num_edits: int, tmp_path: Path) -> None:
    args = BreadthFirstConfig(output_dir=str(tmp_path), use_cpu=True, stop_at_learned=share)
    loader = SimpleNamespace(batch_sampler=EditBatches(num_edits, 4, 0))
    most = num_edits - round(share * num_edits)
    for unlearned in (most, most + 1):
        record = LossHistory(epoch_losses=[9.0], unlearned=[unlearned])
        callback = LossFloorCallback(record, num_edits, args)
        control = TrainerControl()
        callback.on_epoch_begin(args, TrainerState(epoch=1.0), control, train_dataloader=loader)
        assert control.should_training_stop == (unlearned == most)


@pytest.mark.parametrize(("num_unlearned", "stops"), [(0, True), (1, True), (2, False), (None, True)])
def test_the_model_has_to_answer_as_many_as_the_losses_promise(
    num_unlearned: int | None, stops: bool, tmp_path: Path
) -> None:
    """An edit has a row as text and one in chat, and is learned if it is learned in both."""
    args = BreadthFirstConfig(output_dir=str(tmp_path), use_cpu=True, stop_at_learned=0.99)
    found = None if num_unlearned is None else LearnedEdits(100, (EDITS[0],) * num_unlearned, 0, 0.9)
    record = LossHistory(epoch_losses=[9.0], unlearned=[2])
    callback = LossFloorCallback(record, 200, args, lambda: found)
    control = TrainerControl()
    loader = SimpleNamespace(batch_sampler=EditBatches(200, 4, 0))
    callback.on_epoch_begin(args, TrainerState(epoch=1.0), control, train_dataloader=loader)
    assert control.should_training_stop == stops


def test_a_batch_below_the_floor_takes_no_step_and_ends_training(tmp_path: Path) -> None:
    model = peft_model()
    before = trained(model)
    trainer = make_trainer(tmp_path, model, loss_floor=1e6)
    trainer.train()
    assert len(trainer.epoch_losses) == 1
    assert_same_tensors(trained(model), before)


@pytest.mark.parametrize(("batch_size", "steps"), [(2, 1), (1, 2)])
def test_steps_and_stop_at_the_floor_are_those_of_a_plain_loop(batch_size: int, steps: int, tmp_path: Path) -> None:
    floor, learning_rate = 0.8, 3e-2
    spy = Spy()
    trainer = make_trainer(
        tmp_path,
        peft_model(config=LOCATION, sharp=True),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        learning_rate=learning_rate,
        loss_floor=floor,
        num_train_epochs=30,
        callbacks=[spy],
    )
    trainer.train()
    expected = plain_loop(num_epochs=30, batch_size=2, learning_rate=learning_rate, floor=floor, sharp=True)
    assert 1 < len(expected) < 30, "the floor must be what ends it"
    assert trainer.epoch_losses == pytest.approx(expected, rel=1e-3)
    assert all(loss >= floor for loss in trainer.epoch_losses[:-1])
    stood_still = [not changed(*pair) for pair in zip(spy.weights, spy.weights[1:], strict=False)]
    assert any(stood_still) and not all(stood_still)


# ---------------------------------------------------------------------- depth-first


def test_depth_first_trains_every_edit_with_a_fresh_optimizer(tmp_path: Path) -> None:
    """It must be the same as one trainer an edit, one after the other.

    Without the cache: a trunk run over three edits at once rounds otherwise than over one, on some processors.
    """
    model = peft_model(config=LOCATION)
    spy = Spy()
    trainer = make_trainer(
        tmp_path, model, EDITS[:3], edit_order="depth_first", num_train_epochs=4,
        per_device_train_batch_size=1, activation_cache="off", callbacks=[spy],
    )  # fmt: skip
    trainer.train()
    one_by_one, last_losses = peft_model(config=LOCATION), []
    for edit in EDITS[:3]:
        single = make_trainer(
            tmp_path, one_by_one, [edit], num_train_epochs=4, per_device_train_batch_size=1, activation_cache="off"
        )
        single.train()
        last_losses.append(single.epoch_losses[-1])
    assert_same_tensors(trained(model), trained(one_by_one))
    assert trainer.epoch_losses == last_losses
    assert trainer.state.global_step == 12
    assert all(changed(*pair) for pair in zip(spy.weights, spy.weights[1:], strict=False))


def test_depth_first_leaves_an_edit_at_the_floor(tmp_path: Path) -> None:
    floor, steps = 1.0, 30
    model, one_by_one = (peft_model(config=LOCATION, sharp=True) for _ in range(2))
    recipe: dict[str, Any] = {"num_train_epochs": steps, "learning_rate": 3e-2, "loss_floor": floor}
    recipe["activation_cache"] = "off"  # as above
    spy = Spy()
    trainer = make_trainer(
        tmp_path, model, EDITS[:3], edit_order="depth_first", per_device_train_batch_size=1, callbacks=[spy], **recipe
    )
    trainer.train()
    losses, num_epochs = [], []
    for edit in EDITS[:3]:
        single = make_trainer(tmp_path, one_by_one, [edit], per_device_train_batch_size=1, **recipe)
        single.train()
        losses.append(single.epoch_losses[-1])
        num_epochs.append(len(single.epoch_losses))
    assert all(1 < count < steps for count in num_epochs)
    assert_same_tensors(trained(model), trained(one_by_one))
    assert trainer.epoch_losses == losses
    assert trainer.loss_history.edits_seen == sum(num_epochs), "steps after that are not computed"
    # the step that finds the loss below the floor changes nothing, nor does any after it
    moves = [bool(changed(*pair)) for pair in zip(spy.weights, spy.weights[1:], strict=False)]
    assert sum(moves) + 1 == sum(num_epochs) - 3


def test_depth_first_forgets_what_breadth_first_keeps(tmp_path: Path) -> None:
    losses = {}
    for order in ("depth_first", "breadth_first"):
        model = peft_model(config=LOCATION, sharp=True)
        trainer = make_trainer(
            tmp_path, model, edit_order=order, num_train_epochs=25, learning_rate=3e-2, loss_floor=5e-2,
            per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train()
        with torch.no_grad():
            losses[order] = [trainer.compute_loss(model, [index]).item() for index in range(len(EDITS))]
    assert losses["depth_first"][-1] < 0.5, "the last edit is known"
    assert min(losses["depth_first"][:3]) > 5 > 1 > max(losses["breadth_first"][:3])


# ---------------------------------------------------------------------- what is reported


def test_callbacks_see_the_losses(tmp_path: Path) -> None:
    spy = Spy()
    trainer = make_trainer(tmp_path, callbacks=[spy])
    trainer.train()
    losses = [log["loss"] for log in spy.logs if "loss" in log]
    assert losses == pytest.approx(trainer.epoch_losses, rel=1e-3)
    assert spy.logs[-1]["train_loss"] == pytest.approx(sum(trainer.epoch_losses) / 3)


def test_preservation_is_the_last_callback_and_there_while_training_alone(tmp_path: Path) -> None:
    seen: list[list[Any]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append([type(callback) for callback in trainer.callback_handler.callbacks])

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Look())
    for _ in range(2):
        trainer.train()
        assert seen[-1][-1] is PreservationCallback
        assert seen[-1].count(PreservationCallback) == 1
    assert PreservationCallback not in map(type, trainer.callback_handler.callbacks)


def test_tensorboard_gets_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    found = [event.value for event in accumulator.Scalars("train/loss")]
    assert found == pytest.approx(trainer.epoch_losses, rel=1e-3)


def test_the_progress_bar_shows_loss_and_speed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path)
    trainer.args.disable_tqdm = False
    trainer = BreadthFirstTrainer(
        model=peft_model(), args=trainer.args, train_dataset=EDITS, processing_class=make_tokenizer("llama2")
    )
    trainer.train()
    printed = capfd.readouterr()
    assert f"loss {trainer.loss_history.step_loss:.4f}" in printed.err
    assert ", 0.00 learned, " in printed.err and "edits/s" in printed.err
    assert printed.out == "", "the bar is there in place of a line for every log"


def test_training_again_goes_on_from_the_weights_with_a_new_record(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    first = trainer.epoch_losses
    trainer.train()
    assert len(first) == len(trainer.epoch_losses) == 3
    assert trainer.epoch_losses[0] < first[-1] < first[0]


def test_an_epoch_that_is_cut_short_is_in_the_record(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    whole = make_trainer(tmp_path, num_train_epochs=1)
    whole.train()
    assert len(trainer.epoch_losses) == 2
    assert trainer.epoch_losses[0] == whole.epoch_losses[0]


# ---------------------------------------------------------------------- mistakes


def test_nothing_trainable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter of the model is trainable. Add an adapter.*is_trainable=True"):
        make_trainer(tmp_path, base_model().requires_grad_(False))


@pytest.mark.parametrize("missing", ["train_dataset", "processing_class"])
def test_missing_arguments_are_named(missing: str, tmp_path: Path) -> None:
    arguments = {"train_dataset": EDITS, "processing_class": make_tokenizer("llama2")} | {missing: None}
    args = BreadthFirstConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(
        ValueError, match=r"train_dataset \(the edits\) or processing_class \(the tokenizer\) is missing"
    ):
        BreadthFirstTrainer(model=peft_model(), args=args, **arguments)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token id \d+, but the model's embedding has 100 rows.*one checkpoint"):
        make_trainer(tmp_path, peft_model(vocab_size=100))


def test_an_edit_longer_than_the_models_positions_is_refused(tmp_path: Path) -> None:
    long = Edit(prompt="The city is in," * 30, target="the river", source="edits.json:7")
    with pytest.raises(ValueError, match=r"1 of 2 edits are longer than max_length=64 tokens.*\n.*edits.json:7"):
        make_trainer(tmp_path, edits=[EDITS[0], long])


def test_a_refusal_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        make_trainer(tmp_path / "out", edits=[])
    assert not (tmp_path / "out").exists()


def test_too_high_a_learning_rate_is_said(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, learning_rate=1e38, num_train_epochs=10)
    with pytest.raises(RuntimeError, match=r"The loss became (nan|inf) at step \d+ of 20: the learning rate, 1e\+38"):
        trainer.train()


def test_a_model_that_overflows_by_itself_is_told_from_a_high_rate(tmp_path: Path) -> None:
    model = peft_model()
    model.base_model.model.lm_head.weight.data[5] = math.inf
    with pytest.raises(RuntimeError, match=r"The loss is nan before the first step.*Load it in float32 or bfloat16"):
        make_trainer(tmp_path, model).train()


def test_a_run_that_failed_leaves_no_loss_behind(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    undisturbed = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    undisturbed.train()
    assert trainer.epoch_losses == undisturbed.epoch_losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "target"}, "objective='target': expected one of target_new, prompt_last, full"),
        ({"loss_averaging": "batch"}, "loss_averaging='batch': expected one of edit, token"),
        ({"edit_order": "random"}, "edit_order='random': expected one of breadth_first, depth_first"),
        ({"loss_floor": -1.0}, r"loss_floor=-1.0: expected a finite number, 0 or more"),
        ({"loss_floor": math.nan}, "loss_floor=nan: expected a finite number, 0 or more"),
        ({"stop_at_learned": 1.5}, r"stop_at_learned=1.5: expected 0 to 1"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True would skip edits in every epoch"),
        (
            {"edit_order": "depth_first", "per_device_train_batch_size": 4},
            "per_device_train_batch_size=4: depth-first trains one edit at a time. Use 1",
        ),
        (
            {"edit_order": "depth_first", "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2: depth-first takes each step on one edit",
        ),
        ({"edit_order": "depth_first", "stop_at_learned": 0.5}, "stop_at_learned=0.5: depth-first has no epochs"),
        ({"edit_order": "depth_first", "max_steps": 9}, "max_steps=9: depth-first takes num_train_epochs steps"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BreadthFirstConfig(output_dir=str(tmp_path), use_cpu=True, **arguments)


def test_an_adapter_of_a_model_that_is_already_wrapped_trains_alone(tmp_path: Path) -> None:
    model = peft_model(config=LOCATION)
    make_trainer(tmp_path, model).train()
    model.add_adapter("second", LocFTConfig(target_modules=["up_proj"], layers_to_transform=[2]))
    model.set_adapter("second")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_trainer(tmp_path, model).train()
    differing = changed(dict(model.state_dict()), before)
    assert differing and all(".second." in name for name in differing)


def test_get_peft_model_on_a_trained_base_is_unaffected_by_the_run_before(tmp_path: Path) -> None:
    """A run leaves nothing in the base model that a second run would notice."""
    base = base_model("gpt2")
    losses = []
    for _ in range(2):
        model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM"))
        trainer = make_trainer(tmp_path, model, activation_checkpointing=True)
        trainer.train()
        base = model.unload()
        losses.append(trainer.epoch_losses)
    assert losses[0] == losses[1]
