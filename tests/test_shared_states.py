"""What the trials of a search share: one run of the frozen layers, and hashes that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import same_bits
from tiny_training import make_trainer, peft_model

from peft_locft import LocFTConfig
from peft_locft.engine.activation_storage import NAME
from peft_locft.engine.shared_states import SharedStates, shared_states, sharing_states


def states(folder: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file)[NAME] for file in sorted(folder.glob("*.safetensors"))}


def train(folder: Path, layer: int, **arguments: Any) -> None:
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[layer]))
    make_trainer(folder, model, num_train_epochs=1, **arguments).train()


def test_the_last_layer_leaves_what_the_others_would_have_made(tmp_path: Path) -> None:
    with sharing_states(tmp_path / "shared", [2, 0, 1, 2]):
        train(tmp_path, 2)
    for layer in (1, 2):
        train(tmp_path, layer, activation_cache_dir=str(tmp_path / "own"))
    shared, own = states(tmp_path / "shared"), states(tmp_path / "own")
    assert shared.keys() == own.keys() and len(own) == 2
    assert all(same_bits(shared[name], own[name]) for name in own)


def test_nothing_is_shared_outside(tmp_path: Path) -> None:
    assert shared_states() is None
    with sharing_states(tmp_path, [1]):
        assert shared_states() is not None
    assert shared_states() is None


def test_a_frozen_tensor_is_hashed_once_and_a_trained_one_always(tmp_path: Path) -> None:
    hashed: list[int] = []

    def sha256(tensor: torch.Tensor) -> str:
        hashed.append(id(tensor))
        return str(len(hashed))

    shared = SharedStates(tmp_path, (1,))
    frozen, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert [shared.sha256(frozen, sha256) for _ in range(2)] == ["1", "1"]
    assert [shared.sha256(trained, sha256) for _ in range(2)] == ["2", "3"]
