"""`push_to_hub` sends what loads again. What goes over the network is replaced at huggingface_hub's own calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from tiny_training import base_model, peft_model

from peft_locft import LocFTConfig

IDS = torch.arange(3, 9).unsqueeze(0)


def test_what_is_pushed_loads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    created = []

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        created.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self: Any, repo_id: str, operations: list[Any], **kwargs: Any) -> None:
        for operation in operations:
            target = hub / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(operation.path_or_fileobj).read_bytes())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1], init_weights=False))
    model.push_to_hub("somebody/edits")
    assert created == ["somebody/edits"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in hub.iterdir()}
    loaded = PeftModel.from_pretrained(base_model("llama"), str(hub))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
