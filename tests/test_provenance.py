"""The record beside an adapter: written and read again, unknown fields, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from example_reports import example_report
from tiny_training import make_trainer, peft_model

from peft_locft import describe_adapter, export_small, inspect_adapter, save_adapter
from peft_locft.adapters import check_adapter
from peft_locft.adapters.base_model import BaseModel
from peft_locft.adapters.provenance import (
    PROVENANCE_NAME,
    Augmentation,
    ExportDetails,
    Provenance,
    Shrinking,
    TrainedEdits,
    TrainingResult,
    TrainingRun,
)
from peft_locft.training.config import BreadthFirstConfig
from peft_locft.training.record import RECIPE_FIELDS

RECIPE = {
    "learning_rate": 5e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "seed": 42,
    "edit_order": "breadth_first",
    "objective": "target_new",
}
SHA256 = "0123456789abcdef" * 4
FULL = Provenance(
    BaseModel("somebody/model", None, "c0ffee", "other", "own", "LICENSE"),
    {"model.layers.1.mlp.down_proj.weight": SHA256},
    TrainingRun(
        TrainedEdits(2000, SHA256),
        RECIPE,
        TrainingResult([2.0, 0.5], 6, [{"epoch": 1.0, "perplexity": math.inf}], 1.0),
        Augmentation.of_rows(prefixes=["In the city"], counts={"retained_facts": 3}, prompts=["Dave is"]),
        {"times": 1, "added": 2},
    ),
    example_report(),
    Shrinking("bfloat16", 0.2, 0.75),
    ExportDetails("lora", 4, 0.5),
    {"peft-locft": "0.1"},
    {"adapter_model.safetensors": SHA256},
    {"signature": "of a later version"},
)


def written(provenance: Provenance) -> dict[str, Any]:
    """Return the content of the file, by way of JSON without infinities."""
    return dict(json.loads(json.dumps(provenance.to_dict(), allow_nan=False)))


def changed(folder: Path, change: dict[str, Any]) -> None:
    file = folder / PROVENANCE_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def trained(folder: Path) -> Path:
    trainer = make_trainer(folder)
    trainer.train()
    trainer.save_model()
    return folder


# ---------------------------------------------------------------------- written and read


def test_what_is_written_is_read_again() -> None:
    found = Provenance.from_dict(written(FULL), "file")
    assert written(found) == written(FULL)
    assert found.run == FULL.run and found.base_model == FULL.base_model
    assert found.shrunk == FULL.shrunk and found.export == FULL.export and found.others == FULL.others
    # the report without its rows
    assert found.evaluation is not None and FULL.evaluation is not None
    assert found.evaluation.results == FULL.evaluation.results and not found.evaluation.rows


def test_nothing_is_recorded_of_an_adapter_without_a_file() -> None:
    nothing = Provenance()
    assert nothing.rows(detailed=True) == []
    assert Provenance.from_dict(nothing.to_dict(), "file") == nothing


def test_the_keys_in_the_file_are_those_of_format_1() -> None:
    assert set(written(FULL)) == {
        "format",
        "augmentation",
        "base_model",
        "base_sha256",
        "continued",
        "edits",
        "evaluation",
        "export",
        "files",
        "recipe",
        "shrunk",
        "signature",
        "training",
        "versions",
    }
    assert written(FULL)["training"]["curves"] == [{"epoch": 1.0, "perplexity": "inf"}]
    assert written(FULL)["evaluation"].keys() == {"settings", "results", "missing", "notes"}


def test_the_rows_are_the_same_for_the_card_and_for_the_terminal() -> None:
    short, detailed = FULL.rows(detailed=False), FULL.rows(detailed=True)
    assert short == [
        ("edits", f"2,000 (sha256 `{SHA256[:16]}…`)"),
        ("continued", "1 times, 2 added"),
        (
            "recipe",
            "breadth-first, objective `target_new`, learning rate 0.005, batches of 4, 3 epochs at most, seed 42",
        ),
        ("training loss", "2.0000 → 0.5000 in 2 epochs"),
        ("augmentation", "1 prefixes, 3 retained facts"),
        (
            "shrunk",
            "deltas in bfloat16, a share of 0.2 of the values, the largest relative to their weight; kept 0.750000 of "
            "the squared Frobenius norm",
        ),
        ("export", "from a LocFT adapter to lora of rank 4, keeps 0.5000 of the delta"),
        ("made with", "peft-locft 0.1"),
    ]
    assert [row for row in detailed if row in short] == short
    assert {label for label, _ in detailed} - {label for label, _ in short} == {"settings", "prefix", "measured"}


def test_a_metric_that_is_not_finite_does_not_make_the_adapter_unreadable(tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path, record=FULL.run)
    found = check_adapter(tmp_path).provenance.run
    assert found == FULL.run and found is not None and found.training.curves[0]["perplexity"] == math.inf


# ---------------------------------------------------------------------- of a later version


def test_fields_of_a_later_version_are_kept(tmp_path: Path) -> None:
    trained(tmp_path)
    recorded = json.loads((tmp_path / PROVENANCE_NAME).read_text())
    later = {
        "edits": recorded["edits"] | {"languages": ["de"]},
        "training": recorded["training"] | {"seconds": 3.5},
        "recipe": recorded["recipe"] | {"warmth": {"a": 1}},
        "signature": {"by": "somebody"},
    }
    changed(tmp_path, later)
    describe_adapter(tmp_path)
    assert json.loads((tmp_path / PROVENANCE_NAME).read_text()) == recorded | later
    export_small(tmp_path, tmp_path / "small", delta_dtype="bfloat16")
    small = json.loads((tmp_path / "small" / PROVENANCE_NAME).read_text())
    assert {name: small[name] for name in ("edits", "training", "recipe")} == {
        name: later[name] for name in ("edits", "training", "recipe")
    }


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"median": 1}, r"\(results\.a: expected a metric's result: found the unknown fields \['median'\]\)"),
        ({"after": {"value": 1, "low": 1, "high": 1, "mode": 1}}, r"expected the numbers value, low, high\)"),
        ({"after": None}, r"results\.a: expected a metric's result: it has no figure after the edit"),
        ({"after": {"value": True, "low": 1, "high": 1}}, "expected the numbers value, low, high"),
        ({"after": {"value": 10**400, "low": 1, "high": 1}}, "expected the numbers value, low, high"),
        ({"count": -1}, "as its meaning, count and unit"),
        ({"unit": "\x1b[2J"}, "as its meaning, count and unit"),
    ],
)
def test_a_metric_that_this_version_cannot_show_is_refused(
    result: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(peft_model(), tmp_path)
    one = {"value": 1, "low": 1, "high": 1}
    whole = {"meaning": "", "count": 1, "unit": "edits", "before": None, "after": one, "change": None} | result
    evaluation = {"results": {"a": whole}, "settings": {"confidence": 0.95}, "missing": {}, "notes": []}
    changed(tmp_path, {"evaluation": evaluation})
    with pytest.raises(ValueError, match=r"provenance\.json: evaluation is .*; expected results, .*" + message):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"continued": {"times": 1}}, "found only continued; expected all of edits, recipe, training, or none"),
        ({"evaluation": {"curves": []}}, r"\(found the unknown fields \['curves'\]; expected settings, results, miss"),
        (
            {"shrunk": {"density": 10**400, "share_kept": 1}},
            "shrunk is .*; expected delta_dtype, density and share_ke",
        ),
        ({"versions": {"a": "\x1b"}}, "versions is .*; expected version texts"),
    ],
)
def test_what_cannot_be_shown_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(peft_model(), tmp_path)
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=message) as refused:
        inspect_adapter(tmp_path)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("curves", [[{"loss": 1.0}], [[]], [{"epoch": "one"}], [{"epoch": 1, "\x1b": 1}]])
def test_curves_of_something_else_are_refused(curves: list[Any], tmp_path: Path) -> None:
    trained(tmp_path)
    changed(tmp_path, {"training": {"epoch_losses": [], "curves": curves}})
    with pytest.raises(
        ValueError, match=r"provenance\.json: training: curves\[0\]: expected figures by name"
    ) as refused:
        inspect_adapter(tmp_path)
    assert str(refused.value).isprintable()


# ---------------------------------------------------------------------- the recipe

# settings of ours that are not recorded: most say where and when something is computed or stored; those of added rows
# are recorded by the rows that came of them (augmentation); a search records skip_learned_epochs itself
NOT_RECORDED = {
    "activation_cache",
    "activation_cache_dir",
    "logging_strategy",
    "save_strategy",
    "max_tokens_per_micro_batch",
    "trunk_residency",
    "offload_trunk",
    "output_dir",
    "overwrite_output_dir",
    "preserve_cache_dir",
    "save_total_limit",
    "num_prefixes",
    "prefixes_per_edit",
    "num_concatenated",
    "retained_facts",
    "num_retained_facts",
    "retained_facts_choice",
    "retained_subjects",
    "retained_relations",
    "kept_text_pieces",
    "skip_learned_epochs",
    "relative_learning_rate",  # recorded as the losses corrected it, see test_lifelong.py
}


def test_every_setting_of_ours_is_recorded_or_known_not_to_be() -> None:
    own = {
        name
        for kind in BreadthFirstConfig.__mro__
        for name in vars(kind).get("__annotations__", {})
        if (kind.__module__.startswith("peft_locft"))
    }
    assert own - set(RECIPE_FIELDS) <= NOT_RECORDED
