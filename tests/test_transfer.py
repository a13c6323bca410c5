"""An adapter on a fine-tuned descendant of its base: what fine-tuning did to the edited weight, and a verdict."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import base_model, save_base_and_adapter
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM

from peft_locft.adapters import read_adapter
from peft_locft.cli import main
from peft_locft.workflows import transfer_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_base_and_adapter(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def base(saved: tuple[Path, Path]) -> Path:
    return saved[0]


@pytest.fixture
def adapter(saved: tuple[Path, Path]) -> Path:
    return saved[1]


def descendant(base: Path, folder: Path, change: Callable[[Any], object]) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


def test_fine_tuning_elsewhere_leaves_the_edits(base: Path, adapter: Path, tmp_path: Path) -> None:
    ((name, delta),) = read_adapter(adapter).items()
    weight = AutoModelForCausalLM.from_pretrained(base).get_parameter(name).detach()
    noise = 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model = descendant(base, tmp_path / "model", lambda model: model.get_parameter(name).add_(noise))
    report = transfer_adapter(adapter, model, output_dir=tmp_path / "report")
    (change,) = report.changes
    assert change.edit_size == pytest.approx(float(delta.norm() / (weight + noise).norm()), rel=1e-4)
    assert change.change == pytest.approx(float(noise.norm() / weight.norm()), rel=1e-4)
    assert abs(change.cosine or 0) < 0.1
    assert report.survived == 1
    assert report.verdict.startswith("The edits survive: load the adapter")
    assert f"| {name} |" in str(report) and "1.000 of the edits are answered (0.000 without the adapter)" in str(
        report
    )
    assert (tmp_path / "report" / "evaluation.html").exists()


def test_fine_tuning_that_undoes_the_edits(base: Path, adapter: Path, tmp_path: Path) -> None:
    ((name, delta),) = read_adapter(adapter).items()
    model = descendant(base, tmp_path / "model", lambda model: model.get_parameter(name).sub_(delta))
    report = transfer_adapter(adapter, model)
    assert report.changes[0].cosine == pytest.approx(-1, abs=1e-4)
    assert report.survived == 0
    assert report.verdict == "The edits do not survive: train them again on this model."


def test_without_the_base_only_the_edits_are_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = descendant(base, tmp_path / "model", lambda model: None)
    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = copy / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    report = transfer_adapter(copy, model)
    assert (report.changes[0].change, report.changes[0].cosine) == (None, None)
    assert report.survived == 1
    compared = transfer_adapter(copy, model, base_model=str(base))
    assert compared.changes[0].change == 0


def test_what_is_no_descendant(base: Path, adapter: Path, tmp_path: Path) -> None:
    base_model(sharp=True, intermediate_size=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has the shape"):
        transfer_adapter(adapter, tmp_path / "other")
    silent = shutil.copytree(adapter, tmp_path / "silent")
    (silent / "locft_edits.jsonl").unlink()
    with pytest.raises(ValueError, match="edits"):
        transfer_adapter(silent, base)


def test_the_command_line(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["transfer", str(adapter), str(base)])
    assert "The edits survive" in capsys.readouterr().out
