"""From a model's name to a report: bases, adapters, and what does not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judge_server import completion, judge_server
from peft import AutoPeftModelForCausalLM, LoraConfig
from tiny_models import build
from tiny_training import EDITS, TOKENIZER_SIZE, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import EvaluationConfig, EvaluationReport, Probe, evaluate_edits, evaluate_model
from peft_locft.evaluation import JudgeConfig

PROBED = [replace(edit, locality=(Probe("Dave is"),)) for edit in EDITS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = make_trainer(folder, model)
    trainer.train()
    trainer.save_model()
    return folder


def test_an_adapter_is_evaluated_beside_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = evaluate_model(base, PROBED, adapter=adapter, output_dir=tmp_path / "report")
    assert report.has_before
    # the base that the adapter names
    assert evaluate_model(None, PROBED, adapter=adapter).results == report.results
    assert report.settings["adapter"] == str(adapter)
    assert [point["epoch"] for point in report.curves] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "answers.csv",
        "citations.bib",
        "evaluation.html",
        "evaluation.json",
        "evaluation.md",
        "evaluation.tex",
        "metrics.csv",
    ]
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"] == report.rows


def test_a_model_that_somebody_edited_stands_beside_the_one_it_was(base: Path, adapter: Path, tmp_path: Path) -> None:
    beside = evaluate_model(base, PROBED, adapter=adapter)
    AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(tmp_path)
    make_tokenizer("llama2").save_pretrained(tmp_path)
    merged = evaluate_model(tmp_path, PROBED, base_model_name_or_path=base)
    assert merged.results == beside.results
    assert not evaluate_model(tmp_path, PROBED).has_before


def test_num_edits_takes_the_first(base: Path) -> None:
    assert evaluate_model(base, PROBED, num_edits=3)["reliability_exact_match"].count == 3
    with pytest.raises(ValueError, match="num_edits=0: expected 1 or more"):
        evaluate_model(base, PROBED, num_edits=0)


def test_nothing_to_evaluate_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a model nor an adapter"):
        evaluate_model(None, PROBED)
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not name its base model\. Pass model_name_or_path"):
        evaluate_model(None, PROBED, adapter=tmp_path)


def save_other_base(folder: Path, **arguments: Any) -> Path:
    build("llama", **({"vocab_size": TOKENIZER_SIZE} | arguments)).save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


def test_a_wrong_base_is_refused_in_words(adapter: Path, tmp_path: Path) -> None:
    same_shapes = save_other_base(tmp_path / "seed", seed=7)
    with pytest.raises(ValueError, match="trained on another base"):
        evaluate_model(same_shapes, PROBED, adapter=adapter)
    assert evaluate_model(same_shapes, PROBED, EvaluationConfig(allow_other_base=True), adapter=adapter).has_before
    other_shapes = save_other_base(tmp_path / "shape", intermediate_size=64)
    with pytest.raises(ValueError, match=r"the adapter does not fit .*shape: (.|\n)*size mismatch"):
        evaluate_model(other_shapes, PROBED, adapter=adapter)


def test_an_adapter_of_another_architecture_is_refused_in_words(base: Path, tmp_path: Path) -> None:
    model = peft_model(config=LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"target_modules": ["c_proj"]}))
    with pytest.raises(ValueError, match=r"cannot load the adapter onto this model: .*c_proj"):
        evaluate_model(base, PROBED, adapter=tmp_path)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(OSError, match=r"nobody/nothing: the base model and its tokenizer cannot be loaded"):
        evaluate_model("nobody/nothing", PROBED)


def test_a_report_that_cannot_be_written_is_found_before_the_model_is_loaded(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        evaluate_model("nobody/nothing", PROBED, output_dir=tmp_path / "file")


def test_a_judge_reads_the_answers_and_its_replies_are_in_the_folder(base: Path, tmp_path: Path) -> None:
    with judge_server(lambda request, number: completion("RIGHT")) as server:
        judge = JudgeConfig(server.address, model="judge")
        report = evaluate_model(base, PROBED, num_edits=2, output_dir=tmp_path, judge=judge)
        num_asked = len(server.requests)
        evaluate_model(base, PROBED, num_edits=2, output_dir=tmp_path, judge=judge)
        assert len(server.requests) == num_asked == 2
    assert report["reliability_judged"].after.value == 1.0
    assert EvaluationReport.load(tmp_path) == report
    assert len((tmp_path / "judge_replies.jsonl").read_text().splitlines()) == 2


def test_a_judge_that_fails_costs_no_report(base: Path, tmp_path: Path) -> None:
    with judge_server(lambda request, number: (404, {}, b"")) as server, pytest.raises(ValueError, match="status 404"):
        evaluate_model(base, PROBED, num_edits=2, output_dir=tmp_path, judge=JudgeConfig(server.address, model="x"))
    assert "reliability_exact_match" in EvaluationReport.load(tmp_path).results


def test_a_judge_that_is_not_there_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no_judge: found no such folder"):
        evaluate_model("nobody/nothing", PROBED, judge=JudgeConfig(str(tmp_path / "no_judge")))


def test_it_agrees_with_evaluate_edits(base: Path) -> None:
    report = evaluate_model(base, PROBED)
    assert report.results == evaluate_edits(base_model(), make_tokenizer("llama2"), PROBED).results
