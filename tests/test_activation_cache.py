"""The trunk runs once, and the losses are the same as if it ran in every epoch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from tiny_training import base_model, make_trainer, peft_model, trained

from peft_locft import LocFTConfig
from peft_locft.engine.tail import CacheUnusableError, find_tail, logits_at

WHOLE: dict[str, Any] = {"activation_cache": "off", "max_tokens_per_micro_batch": 10**6}

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))


def last_layer() -> LocFTConfig:
    return LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1])


def run(folder: Path, family: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    model = peft_model(family, last_layer(), dtype=dtype)
    trainer = make_trainer(folder, model, **arguments)
    trainer.train()
    return trainer


def is_cached(trainer: Any) -> bool:
    return trainer.runner.plan is not None and trainer.runner.plan.states is not None


@every_family
@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_cache": "memory"},
        {"activation_cache": "disk"},
        {"activation_cache": "auto", "max_tokens_per_micro_batch": 30},
        {"activation_cache": "off", "max_tokens_per_micro_batch": 1},
    ],
    ids=["memory", "disk", "small micro-batches", "one edit a micro-batch"],
)
def test_losses_do_not_depend_on_the_cache(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    whole, other = run(tmp_path, family, **WHOLE), run(tmp_path, family, **arguments)
    assert is_cached(other) == (arguments["activation_cache"] != "off")
    assert not is_cached(other) or (other.runner.plan.packed and len(other.runner.plan.narrow) > 1)
    assert other.epoch_losses == pytest.approx(whole.epoch_losses, rel=1e-6)


@every_family
def test_bfloat16_losses_are_as_close_as_bfloat16_is(family: str, tmp_path: Path) -> None:
    whole, other = run(tmp_path, family, torch.bfloat16, **WHOLE), run(tmp_path, family, torch.bfloat16)
    assert is_cached(other) and other.runner.plan.states.dtype == torch.bfloat16
    assert other.epoch_losses == pytest.approx(whole.epoch_losses, rel=5e-3)


def test_mixed_precision_is_cached(tmp_path: Path) -> None:
    whole, other = run(tmp_path, "llama", bf16=True, **WHOLE), run(tmp_path, "llama", bf16=True)
    assert is_cached(other) and other.runner.plan.packed
    assert other.epoch_losses == pytest.approx(whole.epoch_losses, rel=5e-3)


@pytest.mark.parametrize("objective", ["target_new", "prompt_last", "full"])
def test_every_objective_is_cached(objective: str, tmp_path: Path) -> None:
    runs = [run(tmp_path, "llama", objective=objective, **arguments) for arguments in (WHOLE, {})]
    assert runs[1].epoch_losses == pytest.approx(runs[0].epoch_losses, rel=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_trunk_does_not_run_again_in_later_epochs(layer: int, tmp_path: Path) -> None:
    forwards = []
    for epochs in (2, 7):
        model = peft_model("llama", last_layer())
        ran: list[torch.Tensor] = []
        model.get_base_model().model.layers[layer].mlp.register_forward_hook(lambda *_, ran=ran: ran.append(_[0]))
        make_trainer(tmp_path, model, num_train_epochs=epochs, max_tokens_per_micro_batch=10**6).train()
        forwards.append(len(ran))
    # two batches an epoch
    assert forwards[1] - forwards[0] == (0 if layer == 0 else 5 * 2)


def test_the_model_is_unchanged_afterwards(tmp_path: Path) -> None:
    model = peft_model("llama", last_layer())
    input_ids = torch.arange(6).unsqueeze(0)
    make_trainer(tmp_path, model, learning_rate=0.0).train()
    untouched = base_model("llama")
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, untouched(input_ids).logits)
    assert not any("forward" in vars(layer) for layer in model.get_base_model().model.layers)


def test_training_again_fills_a_new_cache(tmp_path: Path) -> None:
    model = peft_model("llama", last_layer())
    trainer = make_trainer(tmp_path, model, learning_rate=0.0)
    trainer.train()
    first = list(trainer.epoch_losses)
    model.get_base_model().model.embed_tokens.weight.data.mul_(-1)
    trainer.train()
    assert abs(trainer.epoch_losses[0] - first[0]) > 1e-3


def test_no_scratch_file_is_left(tmp_path: Path) -> None:
    run(tmp_path, "llama", activation_cache="disk")
    assert not list(tmp_path.glob(".activation-cache-*"))


# ---------------------------------------------------------------------- where it would be wrong


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0]), r"layer 0 of .*layers is trained"),
        (
            LocFTConfig(target_modules=["embed_tokens"]),
            r"embed_tokens.* is trained and comes before the decoder layers",
        ),
    ],
    ids=["first layer", "embedding"],
)
def test_it_falls_back_and_says_why(
    config: LocFTConfig, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.task_type = "CAUSAL_LM"
    trainer = make_trainer(tmp_path, peft_model("llama", config), num_train_epochs=2)
    trainer.train()
    assert not is_cached(trainer)
    said = [record.message for record in caplog.records if record.name.startswith("peft_locft")]
    assert len(said) == 1
    assert re.search(reason, said[0])
    with pytest.raises(ValueError, match=reason):
        make_trainer(tmp_path, peft_model("llama", config), activation_cache="memory").train()


def test_a_model_whose_layers_share_more_than_states_is_not_cached(tmp_path: Path) -> None:
    """As where later layers use the keys and values of earlier ones."""
    model = peft_model("llama", last_layer())
    layers = model.get_base_model().model.layers
    handed_on: dict[str, torch.Tensor] = {}
    layers[0].mlp.register_forward_hook(lambda module, args, output: handed_on.update(states=output))
    layers[1].mlp.register_forward_hook(lambda module, args, output: output + 10 * handed_on.pop("states", output))
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert not is_cached(trainer)


def test_a_model_without_decoder_layers_has_no_tail() -> None:
    with pytest.raises(CacheUnusableError, match=r"no list of .*decoder layers"):
        find_tail(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@every_family
def test_logits_at_some_positions_are_those_of_all(family: str) -> None:
    model = base_model(family)
    input_ids = torch.arange(12).view(2, 6)
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 3])
    with torch.no_grad():
        expected = model(input_ids).logits[rows, columns]
        found = logits_at(model, rows, columns, {"input_ids": input_ids}).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_adapter_alone_is_trained(tmp_path: Path) -> None:
    model = peft_model("llama", last_layer())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "locft" not in name}
    make_trainer(tmp_path, model).train()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(tensor.abs().sum() > 0 for tensor in trained(model).values())
