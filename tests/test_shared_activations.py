"""What the trials of a search share: one run of the frozen layers, and hashes that are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import same_bits
from tiny_training import make_trainer, peft_model

from peft_locft import LocFTConfig
from peft_locft.engine import activation_storage
from peft_locft.engine.activation_storage import NAME, SharedActivations


def states(folder: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file)[NAME] for file in sorted(folder.glob("*.safetensors"))}


def train(folder: Path, layer: int, **arguments: Any) -> None:
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[layer]))
    make_trainer(folder, model, num_train_epochs=1, **arguments).train()


def test_the_last_layer_leaves_what_the_others_would_have_made(tmp_path: Path) -> None:
    train(tmp_path, 2, shared_activations=SharedActivations(tmp_path / "shared", [2, 0, 1, 2]))
    for layer in (1, 2):
        train(tmp_path, layer, activation_cache_dir=str(tmp_path / "own"))
    shared, own = states(tmp_path / "shared"), states(tmp_path / "own")
    assert shared.keys() == own.keys() and len(own) == 2
    assert all(same_bits(shared[name], own[name]) for name in own)


def test_a_frozen_tensor_is_hashed_once_and_a_trained_one_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def sha256(tensor: torch.Tensor) -> str:
        hashed.append(id(tensor))
        return str(len(hashed))

    monkeypatch.setattr(activation_storage, "tensor_sha256", sha256)
    shared = SharedActivations(tmp_path, (1,))
    frozen, trained = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert [shared.sha256(frozen) for _ in range(2)] == ["1", "1"]
    assert [shared.sha256(trained) for _ in range(2)] == ["2", "3"]
