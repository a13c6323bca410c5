"""The benchmark for a GPU runs at toy sizes, tells broken laws, and ends in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_cells
from benchmarks.timed_cells import Cell, run_cells
from cells_for_tests import broken_law, dies, good, hangs, raises

from peft_locft.tuner.layer import LocFTLayer

REPOSITORY = Path(__file__).parents[1]
LLAMA = gpu.LLAMA_8B


def test_the_toy_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--toy", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["toy"]
    cells = {cell["cell"]: cell for cell in content["cells"]}
    assert {cell["status"] for cell in cells.values()} == {"done"}
    rows = cells[f"laws, {LLAMA}"]["rows"]
    assert [row["attention"] for row in rows] == ["eager", "sdpa"]
    assert all(len(row["laws"]) == 10 and all(row["laws"].values()) for row in rows)
    for variant in ("plain", "ours"):
        assert [row["edits"] for row in cells[f"speed, {LLAMA}, {variant}"]["rows"]] == [8, 24]
    # the figures are those of the engine, and not of the whole model in its place
    assert all(row["packed"] and row["cached"] for row in cells[f"speed, {LLAMA}, ours"]["rows"])
    assert [row["layers on the CPU"] for row in cells["72B"]["rows"]] == [2, 3]
    losses = gpu.loss_rows(gpu.rows_of(content["cells"], "speed"))
    assert len(losses) == 4 and all(row["relative deviation"] < 1e-3 for row in losses)
    assert all(f"## {title}" in done.stdout for title in ("Laws", "Losses", "Speed", "Qwen2.5-72B", "Evaluation"))
    assert "Nothing was measured" not in done.stdout


@pytest.mark.filterwarnings("ignore:Adapter 'default' was trained on another base")  # found by the reload, too
def test_a_broken_law_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unmerge = LocFTLayer.unmerge

    def careless(layer: LocFTLayer) -> None:
        unmerge(layer)
        layer.base_layer.weight.data[0, 0] += 1  # type: ignore[index, operator]

    monkeypatch.setattr(LocFTLayer, "unmerge", careless)
    (row,) = gpu_cells.laws(LLAMA, True, ["eager"])
    assert not row["laws"]["unmerge restores every weight"]
    assert row["laws"]["merged = unmerged"]
    assert "BROKEN" in gpu.law_row(row)["laws"] and "restores every weight" in gpu.law_row(row)["laws"]


def test_wrong_losses_are_a_broken_law(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_loss = gpu_cells.BreadthFirstTrainer.compute_loss

    def wrong(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # of the whole batch, one edit is taken for another
        inputs = [inputs[0], *inputs[:-1]] if isinstance(inputs, list) else inputs
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(gpu_cells.BreadthFirstTrainer, "compute_loss", wrong)
    (row,) = gpu_cells.laws(LLAMA, True, ["eager"])
    assert [law for law, holds in row["laws"].items() if not holds] == ["losses within 1%"]


def test_an_attention_that_is_not_there_is_skipped_with_the_reason() -> None:
    missing, there = gpu_cells.laws(LLAMA, True, ["no_such_attention", "eager"])
    assert "no_such_attention" in missing["skipped"] and "laws" not in missing
    assert all(there["laws"].values())


@pytest.mark.parametrize("variant", ["plain", "ours"])
def test_few_steps_are_extrapolated_and_say_so(variant: str) -> None:
    (row,) = gpu_cells.speed(LLAMA, True, variant, [72], seconds_each=0.0)
    assert row["note"] == "an epoch is extrapolated from 5 of 9 steps"
    assert len(row["step_seconds"]) == 6 and row["epoch_losses"] == []
    assert row["epoch_seconds"] == pytest.approx(9 * sorted(row["step_seconds"][1:])[2])


def test_the_exit_code_is_that_of_the_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "planned", lambda *_: [Cell("laws, tiny", broken_law)])
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert "BROKEN: unmerge restores every weight" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["cells"][0]["status"] == "done"


def test_laws_that_nobody_checked_do_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--toy", "--minutes", "0", "--output", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "No law was checked" in output.err and "0 s were left, and it needs 5" in output.err
    statuses = [cell["status"] for cell in json.loads((tmp_path / "gpu.json").read_text())["cells"]]
    assert set(statuses) == {"skipped"} and len(statuses) > 3


def test_an_attention_that_compiles_takes_no_time_from_the_others() -> None:
    for options in (["--attentions", "flex_attention", "eager"], ["--toy", "--attentions", "flex_attention", "eager"]):
        cells = gpu.planned(gpu.parse(options), toy="--toy" in options)
        tried = {cell.name: cell.arguments["attentions"] for cell in cells if cell.name.startswith("laws")}
        assert cells[-1].name == f"laws, {LLAMA}, flex_attention" and tried.pop(cells[-1].name) == ["flex_attention"]
        assert set(map(tuple, tried.values())) == {("eager",)}


@pytest.mark.parametrize("share_process", [True, False])
def test_one_cell_that_fails_does_not_end_the_others(share_process: bool) -> None:
    cells = [Cell("good", good, {"number": 7}), Cell("raises", raises), Cell("dies", dies)]
    cells += [Cell("hangs", hangs, most_seconds=1.0), Cell("last", good), Cell("after it", good)]
    written: list[int] = []
    until = time.monotonic() + 60
    results = run_cells(
        cells, until, share_process=share_process, after_each=lambda results: written.append(len(results))
    )
    assert [cell["status"] for cell in results] == ["done", "failed", "failed", "stopped", "done", "done"]
    # what a cell found before it ended is there
    assert all(len(cell["rows"]) == 1 for cell in results) and results[0]["rows"][0]["number"] == 7
    assert results[1]["reason"] == "ValueError: found a fault of two lines"
    assert "exit code 3" in results[2]["reason"]
    assert "after its 1 s" in results[3]["reason"]
    assert written == [1, 2, 3, 4, 5, 6]
    processes = [cell["rows"][0]["process"] for cell in results]
    assert len(set(processes)) == (4 if share_process else 6)


def test_a_cell_is_not_started_without_its_time() -> None:
    cells = [Cell("hangs", hangs, least_seconds=0.5), Cell("long", good, least_seconds=30.0)]
    begun = time.monotonic()
    results = run_cells(cells, begun + 4, share_process=False, after_each=lambda results: None)
    assert [cell["status"] for cell in results] == ["stopped", "skipped"]
    assert "it needs 30" in results[1]["reason"] and not results[1]["rows"]
    assert time.monotonic() - begun < 20


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_every_cell_keeps_its_tensors_on_the_device() -> None:
    process = REPOSITORY / "tests" / "emulated_device_process.py"
    done = subprocess.run([sys.executable, str(process)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # the emulation refuses what CUDA refuses
    assert len(found["refused"]) == 2 and all("device" in error for error in found["refused"])
    assert [all(row["laws"].values()) for row in found["laws"]] == [True]
    (plain,), (ours,) = found["plain"], found["ours"]
    assert ours["packed"] and ours["cached"]
    assert ours["epoch_losses"][0] == pytest.approx(plain["epoch_losses"][0], rel=1e-3)
    assert [row["layers on the CPU"] for row in found["72B"]] == [2, 3]
    assert len(found["evaluation"]) == 3
