import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from tiny_training import base_model, make_trainer, peft_model

from peft_locft import LocFTConfig, save_adapter
from peft_locft.card import model_card, provenance, usage_lines

LOCATION = ["model.layers.22.mlp.down_proj.weight"]


def card_of(base: str | None) -> str:
    config = LocFTConfig(base_model_name_or_path=base, target_modules=["down_proj"])
    return model_card(config, provenance(config, None), LOCATION)


def header(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_card_of_a_run_says_what_was_edited_and_how_to_load_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "import peft_locft  # registers LOCFT with PEFT\nfrom peft import AutoPeftModelForCausalLM\n" in card
    assert "- **Location**: `model.layers.1.mlp.down_proj.weight`\n" in card
    sha256 = json.loads((tmp_path / "locft_provenance.json").read_text())["edits"]["sha256"]
    assert f"- **Edits**: 8 (sha256 `{sha256[:16]}…`)\n" in card
    assert "breadth-first, objective `target_new`, learning rate 0.005, batches of 4" in card
    ModelCard.load(tmp_path / "README.md")


def test_a_base_on_the_hub_is_in_the_header() -> None:
    card = card_of("meta-llama/Meta-Llama-3-8B-Instruct")
    assert header(card)["base_model"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert header(card)["library_name"] == "peft"
    assert "- **Base model**: `meta-llama/Meta-Llama-3-8B-Instruct`\n" in card


@pytest.mark.parametrize(
    "base", ["/home/somebody/models/llama", "./llama", "../llama", "models/mine/llama", "llama", None, ""]
)
def test_a_path_on_somebodys_machine_is_not(base: str | None) -> None:
    assert "base_model" not in header(card_of(base))


def test_a_folder_that_looks_like_a_hub_name_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    assert "base_model" not in header(card_of("models/llama"))


def test_a_base_without_a_name_is_said() -> None:
    assert "- **Base model**: `not recorded`\n" in card_of(None)


def test_usage_lines_of_other_methods_import_nothing_of_ours() -> None:
    assert "peft_locft" not in usage_lines(LoraConfig(), "adapter")


@pytest.mark.parametrize("name", ["plain", "it's", 'a "quoted" one', "back\\slash", "Zürich 利根川"])
def test_usage_lines_load_from_any_folder(name: str, tmp_path: Path) -> None:
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / name)
    found: dict[str, object] = {}
    exec(usage_lines(LocFTConfig(), str(tmp_path / name)), found)
    assert isinstance(found["model"], PeftModel)
    assert found["AutoPeftModelForCausalLM"] is AutoPeftModelForCausalLM
