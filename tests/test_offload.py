"""An offloaded trunk: one layer at a time on the training device, and all weights back where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import every_family
from tiny_training import make_trainer, peft_model
from transformers import TrainerCallback

from peft_locft import LocFTConfig
from peft_locft.engine.offload import OffloadedLayer, trunk_offloaded, whole_layer
from peft_locft.tuner.presets import find_decoder_layers

CPU = torch.device("cpu")


def last_layer(family: str = "llama") -> Any:
    return peft_model(family, LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[2]))


def num_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@every_family
def test_losses_are_those_of_a_trunk_on_the_device(family: str, tmp_path: Path) -> None:
    losses = []
    for offload_trunk in (False, True):
        trainer = make_trainer(tmp_path, last_layer(family), offload_trunk=offload_trunk)
        trainer.train()
        assert trainer.runner.plan is not None and trainer.runner.plan.states is not None
        losses.append(trainer.epoch_losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_bytes_on_the_device(tmp_path: Path) -> None:
    """What is part of the model is what `model.to(device)` moves; an offloaded layer is not, and is there alone."""
    model = last_layer()
    _, layers = find_decoder_layers(model)
    first, second, whole = num_bytes(layers[0]), num_bytes(layers[1]), num_bytes(model)
    resident: dict[str, set[int]] = {"computing the states": set(), "training": set()}
    phase = "computing the states"

    def measure(*_: Any) -> None:
        offloaded = [layer for layer in layers if isinstance(layer, OffloadedLayer)]
        running = sum(num_bytes(whole_layer(layer)) for layer in offloaded if layer.is_resident)
        resident[phase].add(num_bytes(model) + running)

    class Phase(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal phase
            phase = "training"

    for layer in layers:
        next(layer.children()).register_forward_hook(measure)
    make_trainer(tmp_path, model, offload_trunk=True, callbacks=[Phase()]).train()
    tail = whole - first - second
    assert resident["training"] == {tail}
    # the tail runs in there too, when the cached states are checked against the whole model
    assert resident["computing the states"] == {tail, tail + first, tail + second}
    assert num_bytes(model) == whole
    assert not any(isinstance(layer, OffloadedLayer) for layer in layers)


def test_layers_move_to_the_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = last_layer()
    _, layers = find_decoder_layers(model)
    own, device = list(layers), torch.device("meta")  # any other than the one at hand
    moves: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, target: moves.append((module, target)))
    with pytest.raises(KeyboardInterrupt), trunk_offloaded(model, device):
        assert moves == [(model, device)]
        offloaded = layers[0]
        assert isinstance(offloaded, OffloadedLayer)
        with offloaded.resident(), offloaded.resident():
            assert moves[1:] == [(own[0], device)]
        assert moves[2:] == [(own[0], CPU)]
        raise KeyboardInterrupt
    assert moves[3:] == [(model, CPU)]
    assert list(layers) == own


def test_a_trunk_on_the_device_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = last_layer(), torch.device("cuda:0")
    own = list(find_decoder_layers(model)[1])
    monkeypatch.setattr(model, "parameters", lambda: iter([torch.nn.Parameter(torch.empty(1, device="meta"))]))
    monkeypatch.setattr(torch.nn.Parameter, "device", device, raising=False)
    moves: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, target: moves.append((module, target)))
    with trunk_offloaded(model, device):
        assert moves == [(own[0], CPU), (own[1], CPU), (model, device)]
    assert moves[3:] == [(model, device)]


def test_a_model_can_read_attributes_of_an_offloaded_layer() -> None:
    _, layers = find_decoder_layers(last_layer("gemma3"))
    offloaded = OffloadedLayer(layers[0], CPU)
    assert offloaded.self_attn is layers[0].self_attn
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = offloaded.no_such_thing


def test_a_model_without_a_trunk_or_on_two_devices_is_an_error(tmp_path: Path) -> None:
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[0]))
    with pytest.raises(ValueError, match=r"found no trunk to offload, since layer 0 of .* is trained"):
        make_trainer(tmp_path, model, offload_trunk=True).train()
    model = last_layer()
    model.get_base_model().lm_head.to("meta")
    with pytest.raises(ValueError, match=r"found the model on cpu, meta, expected one device"):
        make_trainer(tmp_path, model, offload_trunk=True).train()


@pytest.mark.parametrize("field", [{"offload_trunk": True}, {"activation_cache_dir": "x"}])
def test_it_needs_the_cache(field: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(field))}=.* needs the activation cache"):
        make_trainer(tmp_path, activation_cache="off", **field)
