"""What a run prepares is kept for later runs on the same model, and changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same_tensors, randomize
from tiny_training import EDITS, base_model, make_trainer, peft_model, trained
from tokenizers_for_tests import make_tokenizer

from peft_locft.data import generated_text
from peft_locft.data.generated_text import base_texts, generate_prefixes
from peft_locft.engine import preparations
from peft_locft.engine.preparations import Preparations, preparations_folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts are sampled, call by call."""
    counts: list[int] = []
    sample = generated_text.generate_and_score

    def counted(model: Any, tokenizer: Any, questions: Any, **arguments: Any) -> Any:
        counts.append(len(questions))
        return sample(model, tokenizer, questions, **arguments)

    monkeypatch.setattr(generated_text, "generate_and_score", counted)
    return counts


def test_the_same_model_says_the_same_and_is_not_asked_again(calls: list[int], tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer("llama2"), base_model()
    without = generate_prefixes(model, tokenizer, 2, 2), base_texts(model, tokenizer, 300)
    num_calls = len(calls)
    for _ in range(2):
        kept = Preparations(model, tmp_path)
        found = (
            generate_prefixes(model, tokenizer, 2, 2, preparations=kept),
            base_texts(model, tokenizer, 300, preparations=kept),
        )
        assert found == without
    assert len(calls) == 2 * num_calls, "the second time, nothing was sampled"
    # an adapter does not count; another base, seed or length does
    edited = peft_model()
    randomize(edited, std=2.0)
    assert generate_prefixes(edited, tokenizer, 2, 2, preparations=Preparations(edited, tmp_path)) == without[0]
    assert len(calls) == 2 * num_calls
    other = base_model()
    with torch.no_grad():
        other.lm_head.weight += 1e-3
    for changed, arguments in ((other, {}), (model, {"seed": 7}), (model, {"k": 4})):
        before = len(calls)
        generate_prefixes(changed, tokenizer, 2, 2, preparations=Preparations(changed, tmp_path), **arguments)
        assert len(calls) > before


def test_a_damaged_file_is_made_again(calls: list[int], tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer("llama2"), base_model()
    expected = generate_prefixes(model, tokenizer, 1, 0, preparations=Preparations(model, tmp_path))
    for file in tmp_path.glob("*.json"):
        file.write_text("[[1, 2", encoding="utf-8")
    assert generate_prefixes(model, tokenizer, 1, 0, preparations=Preparations(model, tmp_path)) == expected


def test_a_balanced_run_ends_with_the_same_bits_with_and_without(calls: list[int], tmp_path: Path) -> None:
    found, sampled = [], []
    for option in ("off", str(tmp_path / "kept"), str(tmp_path / "kept")):
        recipe = {"recipe": "balanced", "preserve_tokens": 256, "preserve_cache_dir": option, "stop_at_learned": 0}
        before = len(calls)
        trainer = make_trainer(tmp_path / "out", edits=EDITS[:3], num_train_epochs=1, **recipe)
        trainer.train()
        found.append(trained(trainer.model))
        sampled.append(len(calls) - before)
    assert_same_tensors(found[0], found[1])
    assert_same_tensors(found[0], found[2])
    assert sampled[0] == sampled[1] > 0 == sampled[2]
    kept = {file.suffix for file in (tmp_path / "kept").iterdir()}
    assert kept == {".json", ".safetensors"}
    assert list((tmp_path / "out").iterdir()) == [], "nothing of it is in the output folder"


def test_the_shared_folder_is_the_users_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparations.constants, "HF_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    folder = preparations_folder("auto", cpu)
    assert folder is not None and folder.is_relative_to(tmp_path / "peft_locft")
    assert preparations_folder("off", cpu) is preparations_folder(None, cpu) is None
    assert preparations_folder("mine", cpu) == Path("mine")
    monkeypatch.setattr(preparations, "MAX_BYTES", 0)
    Preparations(base_model(), "auto").stored([1], lambda: [[1]])
    assert list(folder.iterdir()) == []
