"""Copies have the bytes of what they copy, whichever way the system takes, and locks die with their process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_locft.io import copies as file_copies
from peft_locft.io import folders
from peft_locft.io.copies import clone, copy_ranges, gaps, place_file, write_all
from peft_locft.io.folders import locked

CONTENT = os.urandom(1 << 20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    path.chmod(0o640)
    return path


def fail(number: int) -> Any:
    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return failing


def copy(source: Path, target: Path, *ranges: tuple[int, int]) -> list[int]:
    done: list[int] = []
    target.touch()
    copy_ranges(source, target, ranges, done.append)
    return done


@pytest.mark.parametrize("in_kernel", [True, False], ids=["copy_file_range", "read and write"])
def test_ranges_are_copied_to_their_places(
    in_kernel: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copies, "COPIED_AT_ONCE", 100_000)
    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", fail(errno.EXDEV), raising=False)
    done = copy(source, tmp_path / "target", (1000, 1500), (2000, 1_000_001))
    expected = bytes(1000) + CONTENT[1000:1500] + bytes(500) + CONTENT[2000:1_000_001]
    assert (tmp_path / "target").read_bytes() == expected
    assert done == [500] + [100_000] * 9 + [98_001]


def test_a_full_disk_and_a_file_that_ends_are_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="source ended while it was copied"):
        copy(source, tmp_path / "target", (0, len(CONTENT) + 1))
    monkeypatch.setattr(os, "copy_file_range", fail(errno.ENOSPC), raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        copy(source, tmp_path / "target", (0, len(CONTENT)))


@pytest.mark.parametrize("link", ["auto", "hard", "copy"])
def test_a_placed_file_has_the_bytes_and_the_mode(link: Any, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    done: list[int] = []
    how = place_file(tmp_path / "link", tmp_path / "target", link, done.append)
    target = tmp_path / "target"
    assert (target.read_bytes(), target.stat().st_mode, target.is_symlink()) == (CONTENT, source.stat().st_mode, False)
    assert sum(done) == len(CONTENT)
    assert os.path.samefile(source, target) == (how == "hard link")
    assert how in {"auto": ("reflink", "hard link"), "hard": ("hard link",), "copy": ("reflink", "copy")}[link]


def test_a_file_system_without_reflinks_is_told_by_nothing_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders.fcntl, "ioctl", fail(errno.EOPNOTSUPP))
    assert not clone(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    monkeypatch.setattr(folders.fcntl, "ioctl", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        clone(source, tmp_path / "target")


def test_a_reflink_is_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    if not clone(source, tmp_path / "target"):
        pytest.skip("this file system has no reflinks")
    with open(tmp_path / "target", "r+b") as file:
        file.write(b"other")
    assert source.read_bytes() == CONTENT
    assert (tmp_path / "target").read_bytes() == b"other" + CONTENT[5:]


def test_links_that_fail_for_other_reasons_are_errors(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copies, "clone", lambda *_: False)
    monkeypatch.setattr(os, "link", fail(errno.EACCES))
    with pytest.raises(PermissionError):
        place_file(source, tmp_path / "target", "auto", print)


def test_gaps_are_what_ranges_leave() -> None:
    assert list(gaps([], 10)) == [(0, 10)]
    assert list(gaps([(6, 8), (2, 6)], 10)) == [(0, 2), (8, 10)]
    assert list(gaps([(0, 10)], 10)) == []
    assert list(gaps([(0, 1), (9, 10)], 10)) == [(1, 9)]


def test_all_is_written_of_what_is_taken_in_parts() -> None:
    taken: list[bytes] = []

    class Slow:
        def write(self, part: memoryview) -> int:
            taken.append(bytes(part[:3]))
            return min(3, len(part))

    write_all(Slow(), memoryview(b"12345678"))  # type: ignore[arg-type]
    assert taken == [b"123", b"456", b"78"]


HOLD = """
import sys, time
from pathlib import Path
from peft_locft.io.folders import locked
with locked(Path(sys.argv[1])) as acquired:
    print(acquired, flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with locked(tmp_path) as acquired:
            assert not acquired
        holder.kill()
        holder.wait()
    with locked(tmp_path) as acquired:
        assert acquired


def test_where_there_are_no_locks_every_process_acquires_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders.fcntl, "flock", fail(errno.ENOLCK))
    with locked(tmp_path) as acquired:
        assert acquired
    monkeypatch.setattr(folders.fcntl, "flock", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass
