"""An adapter goes to the Hub and comes back, through huggingface_hub's own HTTP calls to a fake of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, header_problem, running_hub
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import same_bits
from tiny_training import peft_model

from peft_locft import push_adapter, save_adapter
from peft_locft.adapters import zip_adapter

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "locft_provenance.json"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as server:
        yield server


def run(hub: FakeHub, folder: Path, *orders: str) -> str:
    """Do things in a process of its own, whose cache of the Hub is new and whose Hub is the fake."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_not_a_token",
    }
    command = [sys.executable, str(Path(__file__).with_name("hub_process.py")), str(folder), *orders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not hub.unknown, done.stderr
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_loaded_back(folder: Path) -> None:
    found, expected = (load_file(folder / f"{name}.safetensors")["logits"] for name in ("found", "expected"))
    assert same_bits(found, expected)


def test_what_is_pushed_loads_back_to_the_same_bits(hub: FakeHub, tmp_path: Path) -> None:
    *_, printed, read = run(hub, tmp_path, "push_base", "by_function", "load", "read").splitlines()
    files = hub.repositories["somebody/edits"]
    assert set(files) == ADAPTER_FILES | {"locft_edits.jsonl"}
    assert hub.private == {"somebody/base": False, "somebody/edits": True}
    assert hub.commits["somebody/edits"] == ["Ten facts"]
    assert printed.startswith(f"{hub.endpoint}/somebody/edits/commit/")
    assert_loaded_back(tmp_path)
    card = files["README.md"].decode()
    assert 'AutoPeftModelForCausalLM.from_pretrained("somebody/edits")' in card and "this-repository" not in card
    assert "(https://huggingface.co/somebody/base) at `" in card, "the commit of the base is not in the card"
    assert header_problem(card) is None
    assert ModelCard(card).data.to_dict()["base_model"] == "somebody/base"
    assert "POST /api/validate-yaml" in hub.requests
    assert read == "['model.layers.1.mlp.down_proj.weight'] 8"


def test_the_trainer_pushes_the_same_card(hub: FakeHub, tmp_path: Path) -> None:
    run(hub, tmp_path, "push_base", "by_trainer", "load")
    files = hub.repositories["somebody/edits"]
    assert set(files) >= ADAPTER_FILES
    assert "| Edits | 8 (sha256" in files["README.md"].decode()
    assert header_problem(files["README.md"].decode()) is None
    assert_loaded_back(tmp_path)


def test_pefts_own_push_loads_back_and_has_transformers_card(hub: FakeHub, tmp_path: Path) -> None:
    """The weights are right; the card is one that transformers puts there after everything else."""
    run(hub, tmp_path, "push_base", "by_peft", "load")
    files = hub.repositories["somebody/edits"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "Edited facts" not in files["README.md"].decode()
    assert_loaded_back(tmp_path)


def test_a_card_that_is_pushed_once_is_kept_by_pefts_own_push(hub: FakeHub, tmp_path: Path) -> None:
    run(hub, tmp_path, "push_base", "by_function", "by_peft", "load")
    assert "# Edited facts in base" in hub.repositories["somebody/edits"]["README.md"].decode()
    assert_loaded_back(tmp_path)


def test_a_card_that_the_hub_refuses_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    said = run(hub, tmp_path, "refused")
    assert "README.md: the Hub refuses its header: " in said and "must be one of the known licences" in said
    assert not hub.repositories


# ---------------------------------------------------------------------- refused before any call


def test_a_broken_adapter_is_not_pushed(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path)
    os.truncate(tmp_path / "adapter_model.safetensors", 1000)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors is not a readable safetensors file.*The file is cut off"
    ):
        push_adapter(tmp_path, "somebody/edits")


def test_an_adapter_without_a_card_is_not_pushed(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path)
    (tmp_path / "README.md").unlink()
    with pytest.raises(
        ValueError, match=r"has no README\.md, the model card\. Call describe_adapter, or write it by hand"
    ):
        push_adapter(tmp_path, "somebody/edits")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("base_model: /home/me/model", '"base_model" must be a model id'),
        ("license: mine", '"license" must be one of the known licences'),
        ("license: other", '"license_name" is required with the license "other"'),
        ("tags: [1]", '"tags" must be texts'),
        ("- 1", "the header is no mapping"),
        ("license: mit", None),
    ],
)
def test_the_fake_refuses_bad_headers(header: str, problem: str | None) -> None:
    assert header_problem(f"---\n{header}\n---\n# A card\n") == problem


def test_an_archive_holds_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path / "facts")
    (tmp_path / "facts" / "optimizer.pt").write_bytes(b"large")
    archive = zip_adapter(tmp_path / "facts", tmp_path / "monday.zip", scale=0.5)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    found = {file.name: file for file in (tmp_path / "monday").iterdir()}
    assert found.keys() == ADAPTER_FILES
    config = json.loads(found.pop("adapter_config.json").read_text())
    assert config["scale"] == 0.5
    assert config | {"scale": 1.0} == json.loads((tmp_path / "facts" / "adapter_config.json").read_text())
    assert all(file.read_bytes() == (tmp_path / "facts" / name).read_bytes() for name, file in found.items())


def test_an_adapter_without_a_scale_is_packed_as_it_is(tmp_path: Path) -> None:
    save_adapter(peft_model(config=LoraConfig(target_modules=["down_proj"])), tmp_path / "lora")
    with pytest.raises(ValueError, match="found a LORA adapter, which has no scale of its own"):
        zip_adapter(tmp_path / "lora", tmp_path / "lora.zip", scale=0.5)
    assert not (tmp_path / "lora.zip").exists()
    with zipfile.ZipFile(zip_adapter(tmp_path / "lora", tmp_path / "lora.zip")) as packed:
        assert "lora/adapter_config.json" in packed.namelist()
