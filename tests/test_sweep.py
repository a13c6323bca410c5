"""A part of the sweep over model families that takes less than a minute: one or two families of every kind."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import plain
import pytest
import sweep
from tiny_families import VARIANTS, all_families, build, tiny_config

gc.freeze()  # as in tiny_training

# what a family has that an engine can get wrong
FAMILIES = {
    "llama": "the ordinary one",
    "llama (eager)": "attention written out",
    "llama (tied head)": "one matrix for both ends",
    "mistral": "a sliding window shorter than the text",
    "gemma2 (eager)": "soft caps",
    "gpt_oss": "experts, attention sinks",
    "qwen3_next": "linear attention, a shared expert",
    "mamba": "a state space",
    "mamba2": "a state space in chunks",
    "lfm2": "convolutions between attention",
    "falcon": "layers that return tuples, multi-query",
    "bloom": "layers that return tuples, ALiBi",
    "gpt_bigcode": "multi-query",
    "hrm_text": "layers that run several times",
    "diffllama": "attention called twice in a layer",
    "gemma3n_text": "inputs of every layer",
    "deepseek_v32": "sparse attention by an indexer",
    "glm_moe_dsa": "an indexer shared by layers",
    "deepseek_v4": "attention to compressed keys",
    "rwkv": "left padding is not neutral",
    "qwen2_5_vl": "images beside text",
}
SEE_AHEAD = ("bert", "paligemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_plain_computation(family: str) -> None:
    row = sweep.sweep_family(family, ("losses", "gradient", "answers", "merging"))
    bad = [finding for finding in row.findings if finding.status != "right"]
    assert row.verdict.startswith("right"), f"{row.verdict}: {bad}"


@pytest.mark.parametrize("family", SEE_AHEAD)
def test_a_model_that_sees_ahead_is_refused(family: str) -> None:
    row = sweep.sweep_family(family)
    assert row.verdict == "refused: sees ahead", row.findings


def test_what_sees_ahead_is_found() -> None:
    seen = {family: plain.sees_ahead(build(family)) for family in ("llama", "qwen3_moe", "deepseek_v32", "bert")}
    assert seen == {"llama": "no", "qwen3_moe": "no", "deepseek_v32": "in part", "bert": "yes"}


def test_a_loss_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sweep.plain_losses
    monkeypatch.setattr(sweep, "plain_losses", lambda *inputs: [loss + 1e-2 for loss in exact(*inputs)])
    row = sweep.sweep_family("llama", ["losses"])
    assert row.verdict == "WRONG"
    assert row.worst is not None
    assert row.worst.deviation == pytest.approx(1e-2, rel=1e-2)


def test_an_answer_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sweep.plain_answer

    def another(*inputs: object) -> tuple[list[int], list[float]]:
        tokens, margins = exact(*inputs)  # type: ignore[arg-type]
        return [*tokens[:-1], tokens[-1] + 1], margins

    monkeypatch.setattr(sweep, "plain_answer", another)
    assert sweep.sweep_family("llama", ["answers"]).verdict == "WRONG"


def test_every_kind_of_layer_is_built() -> None:
    assert set(tiny_config("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny_config("lfm2").layer_types) == {"conv", "full_attention"}
    assert tiny_config("gemma3_text").sliding_window < min(map(len, (edit.prompt for edit in sweep.EDITS))) + 10
    assert len(all_families()) > 250


def test_a_family_that_cannot_be_built_says_why() -> None:
    row = sweep.sweep_family("pi0")
    assert row.verdict == "not built"
    assert "needs the state of a robot" in row.findings[0].detail


def test_table_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sweep.json"
    arguments = ["sweep", "--families", "llama,pi0", "--checks", "merging", "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    sweep.main()
    assert [row["verdict"] for row in json.loads(output.read_text())] == ["right", "not built"]
    printed = capsys.readouterr().out
    assert "1 families and variants" in printed and "| right | 1 |" in printed
    assert "| llama | right |" in printed and "Not built: pi0 (" in printed


def test_variants_name_families() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} <= set(all_families())
    assert build("llama (tied head)").config.tie_word_embeddings
