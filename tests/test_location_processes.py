"""A search that is killed and goes on, and one that two processes share."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_searches import PROBED
from tiny_training import base_model
from tokenizers_for_tests import make_tokenizer

SCRIPT = Path(__file__).with_name("killed_search_process.py")


def run(folder: Path, kills: Any) -> list[int]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(kills)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads((folder / "codes.json").read_text())
    return codes


def test_a_killed_search_ends_as_one_that_was_not_disturbed(tmp_path: Path) -> None:
    assert run(tmp_path / "undisturbed", [None]) == [0]
    # while the states are made, while a trial trains, then in the second rung
    assert run(tmp_path / "disturbed", [2, 5, 9, None]) == [-signal.SIGKILL] * 3 + [0]
    found = [json.loads((tmp_path / name / "found.json").read_text()) for name in ("undisturbed", "disturbed")]
    assert found[0] == found[1]
    best = [(tmp_path / name / "best.json").read_bytes() for name in ("undisturbed", "disturbed")]
    assert best[0] == best[1]


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    base_model(sharp=True).save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    edits = [{"prompt": edit.prompt, "target_new": edit.target, "rephrase": edit.rephrasings[0]} for edit in PROBED]
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    assert run(tmp_path, "together") == [0, 0]
    content = json.loads((tmp_path / "out" / "locations.json").read_text())
    assert [trial["rung"] for trial in content["trials"]] == [0, 0, 0, 0, 1, 1]
    assert not (tmp_path / "out" / "states").exists()
    table = (tmp_path / "out" / "locations.md").read_text()
    printed = [(tmp_path / f"printed-{rank}.txt").read_text() for rank in (0, 1)]
    assert printed[0].startswith(table) and "train with --location best.json" in printed[0]
    assert printed[1] == ""
