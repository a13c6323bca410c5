"""Two processes that save and merge to one name at the same time take nothing from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from saving_process import make_adapter
from tiny_checkpoints import edit, save_base, snapshot

from peft_locft import merge_checkpoint, save_adapter
from peft_locft.io import folders

SCRIPT = Path(__file__).with_name("writing_process.py")
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, an adapter for it, and what saves and merges write when they are alone."""
    folder = tmp_path_factory.mktemp("place")
    base = save_base(folder / "base")
    edit(base, folder / "adapter")
    save_adapter(make_adapter("down"), folder / "down")
    save_adapter(make_adapter("up"), folder / "up")
    merge_checkpoint(base, [folder / "adapter"], folder / "merged")
    return folder


@pytest.fixture(scope="module")
def other(place: Path) -> Iterator[Process]:
    command = [sys.executable, str(SCRIPT), str(place / "base"), str(place / "adapter")]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert answer(process) == "ready"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def answer(process: Process) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def tell(process: Process, what: object) -> str:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what, default=str) + "\n")
    process.stdin.flush()
    return answer(process)


def assert_alone(folder: Path, expected: Path) -> None:
    """Assert that a folder holds these files, and that nothing is left beside it."""
    assert snapshot(folder) == snapshot(expected)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("existing", [True, False])
def test_a_save_while_another_save_is_under_way(existing: bool, place: Path, other: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing:
        save_adapter(make_adapter("up"), out)
        (out / "mine.txt").write_text("mine")
    assert tell(other, {"action": "save", "folder": out}) == "open"
    save_adapter(make_adapter("down"), out)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out already exists: a merge writes a new folder"):
        merge_checkpoint(place / "base", [place / "adapter"], out)
    assert tell(other, "go on") == "done"
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    assert_alone(out, place / "up")


def test_a_save_while_a_merge_is_under_way(place: Path, other: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tell(other, {"action": "merge", "folder": out}) == "open"
    save_adapter(make_adapter("down"), out)
    assert "out already exists: another process created it during this run" in tell(other, "go on")
    assert_alone(out, place / "down")


def test_a_save_beside_a_merge_under_way_that_is_gone_when_it_ends(
    place: Path, other: Process, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert tell(other, {"action": "merge", "folder": out}) == "open"
    save_adapter(make_adapter("down"), out)
    os.rename(out, place / f"moved by {os.getpid()}")
    assert tell(other, "go on") == "done"
    assert_alone(out, place / "merged")


def test_a_merge_while_another_merge_is_under_way(place: Path, other: Process, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tell(other, {"action": "merge", "folder": out}) == "open"
    merge_checkpoint(place / "base", [place / "adapter"], out)
    assert "out already exists: another process" in tell(other, "go on")
    assert_alone(out, place / "merged")


def test_a_merge_while_a_save_is_under_way(place: Path, other: Process, tmp_path: Path) -> None:
    """The save adds its files, as it does to any folder that is there; the merged model keeps all of its own."""
    out = tmp_path / "out"
    assert tell(other, {"action": "save", "folder": out}) == "open"
    merge_checkpoint(place / "base", [place / "adapter"], out)
    assert tell(other, "go on") == "done"
    found = snapshot(out)
    assert found == snapshot(place / "merged") | snapshot(place / "up")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_there_are_no_locks_what_is_new_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_acquire", lambda folder: (None, None))  # as on Windows
    new, old = tmp_path / ".locft-out-abcdefg1", tmp_path / ".locft-out-abcdefg2"
    for path in (new, old):
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")
    for path in (old / "adapter_config.json", old):
        os.utime(path, (0, 0))
    with folders.atomic_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "out"]
    assert (tmp_path / "out" / "file").read_text() == "whole"
