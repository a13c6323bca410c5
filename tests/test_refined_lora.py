"""A LoRA adapter that starts from the truncated delta and is trained until it answers the edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_training import EDITS, save_base_and_adapter
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM

from peft_locft import EvaluationConfig, LocFTConfig, evaluate_edits
from peft_locft.adapters import export_lora, inspect_adapter, read_adapter
from peft_locft.cli import main
from peft_locft.engine.model_state import as_base
from peft_locft.workflows import export_refined_lora
from peft_locft.workflows.refined_lora import _balance, _with_weights, edited_weights

RANK = 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 1], task_type="CAUSAL_LM", scale=0.5)
    return save_base_and_adapter(tmp_path_factory.mktemp("saved"), config)


@pytest.fixture
def base(saved: tuple[Path, Path]) -> Path:
    return saved[0]


@pytest.fixture
def adapter(saved: tuple[Path, Path]) -> Path:
    return saved[1]


def reliability(base: Path, lora: Path) -> float:
    # stock PEFT loads it
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora)
    args = EvaluationConfig(protocols=["generation"])
    report = evaluate_edits(model, make_tokenizer("llama2"), EDITS, args, progress=False)
    return float(report.results["reliability_exact_match"].after.value)


def test_it_answers_what_the_truncated_delta_lost(base: Path, adapter: Path, tmp_path: Path) -> None:
    export_lora(adapter, tmp_path / "truncated", rank=RANK)
    how: dict[str, Any] = {"rank": RANK, "num_train_epochs": 60, "relative_learning_rate": 0.1, "progress": False}
    summary = export_refined_lora(adapter, tmp_path / "refined", **how)
    assert summary.truncated.reliability < summary.learned.reliability == 1
    assert summary.truncated.reliability == reliability(base, tmp_path / "truncated") < 1
    assert reliability(base, tmp_path / "refined") == 1
    assert 0 < summary.num_epochs <= 60
    config = LoraConfig.from_pretrained(tmp_path / "refined")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (RANK, RANK, str(base))
    sizes = [
        {name: shape for name, (_, shape) in inspect_adapter(tmp_path / name).tensors.items()}
        for name in ("truncated", "refined")
    ]
    assert sizes[0] == sizes[1]
    assert "refined for" in str(summary) and "truncated: " in str(summary)


def test_nothing_is_trained_where_nothing_was_lost(adapter: Path, tmp_path: Path) -> None:
    summary = export_refined_lora(adapter, tmp_path / "refined", rank=32, progress=False)
    assert (summary.num_epochs, summary.learned.reliability) == (0, 1)


def test_the_reference_is_the_full_delta(base: Path, adapter: Path, tmp_path: Path) -> None:
    export_lora(adapter, tmp_path / "lora", rank=RANK)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
        from peft_locft.adapters import check_adapter

        edited, before = edited_weights(model, check_adapter(adapter)), model(ids).logits
        with _with_weights(model, edited):
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, before)
        with as_base(model):
            assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits)
    assert edited.keys() == read_adapter(adapter).keys()


def test_balancing_keeps_the_product(base: Path, adapter: Path, tmp_path: Path) -> None:
    export_lora(adapter, tmp_path / "lora", rank=RANK)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and "default" in module.lora_A]
    before = [layer.get_delta_weight("default").clone() for layer in layers]
    size = _balance(model)
    assert len(layers) == 2
    for layer, product in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), product)
        sizes = [float(part["default"].weight.square().mean().sqrt()) for part in (layer.lora_A, layer.lora_B)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5) and sizes[0] >= size * 0.999


def test_the_command_line(adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["export", str(adapter), str(tmp_path / "out"), "--to", "lora", "--rank", "32", "--refine"])
    assert "refined for 0 epochs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", str(adapter), str(tmp_path / "out"), "--to", "peft", "--refine"])
    assert "use it with --to lora" in capsys.readouterr().err
