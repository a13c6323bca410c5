"""The baselines: what each is, that all start from the same base, and that a killed run goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import assert_same_tensors, base_state
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

import peft_locft.workflows.baselines as module
from peft_locft import BreadthFirstConfig, EvaluationConfig, LocFTConfig, Probe
from peft_locft.reporting.baselines import BaselineResult, baselines_to_markdown
from peft_locft.workflows import trials
from peft_locft.workflows.baselines import METHODS, baselines, compare_baselines, run_baselines

PROBED = [replace(edit, locality=(Probe("Dave is"),), rephrasings=(f"So: {edit.prompt}",)) for edit in EDITS]
QUICK = EvaluationConfig(protocols=["generation", "token_accuracy"], max_new_tokens=4)


def recipe(folder: Path, **arguments: Any) -> BreadthFirstConfig:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "use_cpu": True}
    return BreadthFirstConfig(output_dir=str(folder), disable_tqdm=True, report_to="none", **(settings | arguments))


def test_every_method_runs_in_either_order_and_by_either_averaging() -> None:
    assert [str(baseline) for baseline in baselines(20, ["FT-M"])] == [
        "FT-M, depth-first, batches of 1",
        "FT-M, breadth-first, batches of 1",
        "FT-M, breadth-first, batches of 20, by edit",
        "FT-M, breadth-first, batches of 20, by token",
    ]
    assert len(baselines(20)) == 4 * len(METHODS)


def test_all_start_from_the_same_base_and_leave_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    before, recipes = base_state(model), []
    trainer = trials.BreadthFirstTrainer

    def recorded(model: Any, args: Any, **kwargs: Any) -> Any:
        made = trainer(model=model, args=args, **kwargs)
        trained = sorted({name.split(".")[-3] for name, tensor in model.named_parameters() if tensor.requires_grad})
        fields = ("objective", "append_eos", "edit_order", "train_batch_size", "loss_averaging")
        recipes.append((*(getattr(args, name) for name in fields), *trained))
        return made

    monkeypatch.setattr(trials, "BreadthFirstTrainer", recorded)
    rows = compare_baselines(model, tokenizer, PROBED, recipe(tmp_path), methods=list(METHODS), evaluation=QUICK)
    assert_same_tensors(base_state(model), before)
    assert recipes[:4] == [
        ("prompt_last", False, "depth_first", 1, "edit", "locft_delta"),
        ("prompt_last", False, "breadth_first", 1, "edit", "locft_delta"),
        ("prompt_last", False, "breadth_first", 4, "edit", "locft_delta"),
        ("prompt_last", False, "breadth_first", 4, "token", "locft_delta"),
    ]
    assert [entry[1] for entry in recipes[4::4]] == [False, True, True]
    assert {entry[0] for entry in recipes[4:]} == {"target_new"}
    assert recipes[-1][5:] == ("lora_A", "lora_B")
    assert len({json.dumps(row.before) for row in rows}) == 1
    assert len({json.dumps(row.metrics) for row in rows}) > 1


def test_results_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    measure = module._Comparison._measured
    measured: list[str] = []

    def counted(comparison: Any, baseline: Any, args: Any) -> dict[str, Any]:
        if len(measured) == allowed:
            raise KeyboardInterrupt
        measured.append(str(baseline))
        return measure(comparison, baseline, args)

    monkeypatch.setattr(module._Comparison, "_measured", counted)
    allowed = 2
    arguments: dict[str, Any] = {"methods": ["LocFT"], "evaluation": QUICK}
    with pytest.raises(KeyboardInterrupt):
        compare_baselines(model, tokenizer, PROBED, recipe(tmp_path), **arguments)
    allowed = 100
    rows = compare_baselines(model, tokenizer, PROBED, recipe(tmp_path), **arguments)
    assert measured == [str(baseline) for baseline in baselines(4, ["LocFT"])]
    assert compare_baselines(model, tokenizer, PROBED, recipe(tmp_path), **arguments) == rows
    assert len(measured) == 4
    compare_baselines(model, tokenizer, PROBED, recipe(tmp_path, learning_rate=1e-3), **arguments)
    assert len(measured) == 8
    assert (tmp_path / "baselines.md").read_text().count("\n") == 7
    assert (tmp_path / "baselines.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_begins_with_the_base() -> None:
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {
        "baseline": {"method": "FT-M", "edit_order": "breadth_first", "batch_size": 20, "loss_averaging": "token"},
        "before": {"reliability_exact_match": estimate},
        "metrics": {"reliability_exact_match": estimate, "locality_unchanged": estimate},
        "final_loss": 0.25,
        "training_seconds": 12.3,
        "processor_seconds": 10.4,
        "peak_bytes": 1_500_000_000,
    }
    assert baselines_to_markdown([BaselineResult.from_dict(row)]).splitlines() == [
        "| method | setting | reliability_exact_match | locality_unchanged | processor s | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| base | | 0.500 [0.250, 0.750] | - | | |",
        "| FT-M | breadth-first, batches of 20, by token | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] | 10 | 1500 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1,), "batch_size=1: expected 2 or more"),
        ((20, ["ROME"]), "methods: found ROME; expected some of FT-L, FT-M, LocFT, LoRA, LocFT-published"),
    ],
)
def test_what_is_no_baseline_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        baselines(*arguments)


def test_baselines_are_run_from_a_models_name(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    location = LocFTConfig(target_modules=["up_proj"], layers_to_transform=[1])
    rows = run_baselines(
        tmp_path / "base", PROBED, recipe(tmp_path / "out"), location=location, methods=["LoRA"], num_edits=4
    )
    assert [row.baseline.method for row in rows] == ["LoRA"] * 4
    assert location.task_type is None
