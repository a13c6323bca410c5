"""States in a file: a later run uses them only if it would compute the same, and no file is half-written."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_training import EDITS, make_trainer, peft_model

from peft_locft import LocFTConfig
from peft_locft.engine.activation_storage import NAME, new_states_file, state_files
from peft_locft.engine.prefix_tree import PrefixTree
from peft_locft.engine.tail import find_tail


def train(folder: Path, model: Any = None, edits: Any = EDITS, layer: int = 1, **arguments: Any) -> Any:
    config = LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[layer])
    model = peft_model("llama", config) if model is None else model
    trainer = make_trainer(folder, model, edits, activation_cache_dir=str(folder / "states"), **arguments)
    trainer.train()
    return trainer


def files(folder: Path) -> list[Path]:
    return sorted((folder / "states").iterdir())


def is_reused(caplog: pytest.LogCaptureFixture) -> bool:
    said = "Using the activations" in caplog.text
    caplog.clear()
    return said


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peft_locft")


def test_a_later_run_uses_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(tmp_path)
    assert not is_reused(caplog)
    [file] = files(tmp_path)
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert train(tmp_path).epoch_losses == first.epoch_losses
    assert is_reused(caplog)
    train(tmp_path, learning_rate=1e-3, num_train_epochs=1)
    assert is_reused(caplog)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor(NAME), first.runner.plan.states)


def test_another_run_does_not_use_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path)
    trunk = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    trunk.get_base_model().model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    others: list[dict[str, Any]] = [
        {"edits": EDITS[:-1]},
        {"layer": 2},
        {"model": trunk},
        {"append_eos": False},
        {
            "model": peft_model(
                "llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1]), dtype=torch.bfloat16
            )
        },
    ]
    for number, other in enumerate(others, start=2):
        train(tmp_path, **other)
        assert not is_reused(caplog), other
        assert len(files(tmp_path)) == number, other


def test_an_offloaded_trunk_is_known_by_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, layer=2)
    train(tmp_path, layer=2, offload_trunk=True)
    assert is_reused(caplog)
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[2]))
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    train(tmp_path, model, offload_trunk=True)
    assert not is_reused(caplog)


def test_what_comes_after_the_trunk_does_not_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path)
    trained_on = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    trained_on.get_base_model().model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    train(tmp_path, trained_on)
    assert is_reused(caplog)


@pytest.mark.parametrize("damage", ["cut short", "empty", "another shape"])
def test_an_incomplete_file_is_computed_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = train(tmp_path).epoch_losses
    [file] = files(tmp_path)
    content = file.read_bytes()
    if damage == "another shape":
        with new_states_file(file, (3, 32), torch.float32) as states:
            states.zero_()
    else:
        file.write_bytes(content[: len(content) - 8] if damage == "cut short" else b"")
    assert train(tmp_path).epoch_losses == expected
    assert "computed again" in caplog.text
    assert file.read_bytes() == content


def test_nothing_half_written_has_the_name(tmp_path: Path) -> None:
    path = tmp_path / "states" / "x.safetensors"
    with pytest.raises(KeyboardInterrupt), new_states_file(path, (4, 2), torch.bfloat16) as states:
        states.fill_(1)
        assert not path.exists()
        raise KeyboardInterrupt
    assert files(tmp_path) == []


def test_the_file_of_a_killed_run_is_deleted_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    old, young = folder / ".x.safetensors-old", folder / ".y.safetensors-young"
    for file in (old, young):
        file.write_bytes(b"x")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    with new_states_file(folder / "x.safetensors", (4, 2), torch.float32) as states:
        states.fill_(1)
    assert [file.name for file in files(tmp_path)] == [".y.safetensors-young", "x.safetensors"]


def test_an_offloaded_weight_cannot_be_hashed(tmp_path: Path) -> None:
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    model.get_base_model().model.layers[0].to("meta")
    tree = PrefixTree.of(torch.arange(4), torch.tensor([0, 4]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"activation_cache_dir: .*\.weight is offloaded"):
        state_files(tmp_path, model, find_tail(model), tree, torch.device("cpu"))
