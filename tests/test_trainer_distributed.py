"""Law: one process and several train the same, whatever shards the weights between them or takes them elsewhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_processes import NUM_PROCESSES, STRATEGIES, edit_trainer
from safetensors.torch import load_file
from tiny_training import base_model

SCRIPT = Path(__file__).with_name("distributed_processes.py")
RECIPES: dict[str, dict[str, Any]] = {
    "uneven": {"num_edits": 7, "per_device_train_batch_size": 2},
    "uncached": {"num_edits": 7, "per_device_train_batch_size": 2, "activation_cache": "off"},
    # one process has fewer pieces than the other, and in the last batch no edit at all
    "pieces": {"num_edits": 5, "per_device_train_batch_size": 2, "max_tokens_per_micro_batch": 24},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "loss_averaging": "token"},
    "floor": {"per_device_train_batch_size": 1, "learning_rate": 3e-2, "loss_floor": 9.0},
    "learned": {
        "per_device_train_batch_size": 2,
        "learning_rate": 6e-2,
        "stop_at_learned": 0.1,
        "num_train_epochs": 12,
    },
    "prompt writes": {"per_device_train_batch_size": 2, "gradient_tokens": "prompt"},
    "depth first": {"num_edits": 3, "per_device_train_batch_size": 1, "edit_order": "depth_first"},
}
# what needs the base whole in every process
ROWS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "num_prefixes": 2,
    "retained_facts": "facts.txt",
    "num_retained_facts": 6,
    "preserve_soft_strength": 2.0,
    "preserve_tokens": 400,
}
FACTS = "\n".join(f"The {noun} of the {place}" for noun in ("river", "city", "king") for place in ("country", "town"))


def recipes_of(strategy: str, folder: Path) -> dict[str, dict[str, Any]]:
    if strategy != "DDP":
        return RECIPES
    facts = folder / "facts.txt"
    facts.write_text(FACTS)
    return RECIPES | {"rows": ROWS | {"retained_facts": str(facts)}}


def run_processes(strategy: str, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), strategy, str(port), str(folder), json.dumps(recipes_of(strategy, folder))]
    # a session of their own, so that none outlives the time limit
    script = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = script.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)
        raise
    assert script.returncode == 0, errors[-5000:]


def assert_same_adapter(found_in: Path, expected_in: Path) -> None:
    """Assert that both hold one delta and nothing else, the same but for rounding."""
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (found_in, expected_in))
    ((name, delta),) = expected.items()
    assert found.keys() == {name}
    assert (found[name] - delta).abs().max() <= 1e-4 * delta.abs().max(), found_in


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_processes_train_as_one_does(strategy: str, tmp_path: Path) -> None:
    if strategy == "ZeRO-3":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    base_model(sharp=True).save_pretrained(tmp_path / "model")
    run_processes(strategy, tmp_path)
    for name, recipe in recipes_of(strategy, tmp_path).items():
        whole_batch = {"per_device_train_batch_size": recipe["per_device_train_batch_size"] * NUM_PROCESSES}
        own = recipe if "edit_order" in recipe else recipe | whole_batch
        trainer = edit_trainer(tmp_path / name / "alone", tmp_path / "model", **own)
        trainer.train()
        trainer.save_model()
        for rank in range(NUM_PROCESSES):
            left = json.loads((tmp_path / name / f"left-{rank}.json").read_text())
            assert left["losses"] == pytest.approx(trainer.epoch_losses, rel=1e-5), name
            assert left["cached"] == (name != "uncached")
            assert len(left["losses"]) < 12
        assert_same_adapter(tmp_path / name, tmp_path / name / "alone")


@pytest.mark.parametrize("on_disk", [["model.embed_tokens", "model.layers.0"], ["model.layers.1", "lm_head"]])
def test_a_dispatched_model_trains_as_a_whole_one_does(on_disk: list[str], tmp_path: Path) -> None:
    base_model(sharp=True).save_pretrained(tmp_path / "model")
    modules = ["embed_tokens", "rotary_emb", "norm", "layers.0", "layers.1", "layers.2"]
    device_map = {name: "disk" if name in on_disk else "cpu" for name in ["lm_head", *(f"model.{m}" for m in modules)]}
    dispatched = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    losses = []
    for name, placement in (("whole", {}), ("dispatched", dispatched)):
        trainer = edit_trainer(tmp_path / name, tmp_path / "model", placement)
        trainer.train()
        trainer.save_model()
        assert trainer.runner.plan is not None
        losses.append(trainer.epoch_losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_same_adapter(tmp_path / "dispatched", tmp_path / "whole")
