"""A kill while the trunk runs, or while the edits are trained, and the run that goes on from there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny_models import assert_same_tensors

SCRIPT = Path(__file__).with_name("killed_training_process.py")
TRUNK, TAIL = 0, 1
RUNS = ("disturbed", "undisturbed")


def run(folder: Path, kills: list[Any]) -> dict[str, Any]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(kills)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "codes.json").read_text()) == [-signal.SIGKILL if kill else 0 for kill in kills]
    return load_file(folder / "adapter_model.safetensors")


def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "undisturbed", [None])
    # ten forwards are checks; while the states are made, then further and further into training
    kills = [[TRUNK, 13], [TAIL, 20], [TAIL, 25], [TAIL, 20]]
    disturbed = run(tmp_path / "disturbed", [*kills, None])
    assert_same_tensors(disturbed, undisturbed)
    left, made = (sorted(path.name for path in (tmp_path / name / "states").iterdir()) for name in RUNS)
    # the killed run's unfinished file has another name
    assert [name for name in left if not name.startswith(".")] == made
    assert len(left) == 2
