"""A full disk: one clear error, before anything is lost."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_training import make_trainer

from peft_locft.io.bounded_folder import mark_used, remove_oldest
from peft_locft.io.disk_space import DiskFullError, explained_disk_full, reserve, size
from peft_locft.io.files import atomic_file
from peft_locft.io.interruption import explained_interruption


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(1_500, "1.5 kB"), (234_900_000, "234.9 MB"), (2_100_000_000, "2.1 GB")]
)
def test_sizes_are_texts(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_error_about_a_full_disk_is_the_same_one(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=f"{tmp_path} has .* free. Free some space"), explained_disk_full(tmp_path):
        raise error
    with pytest.raises(ValueError, match="other"), explained_disk_full(tmp_path):
        raise ValueError("other")
    with pytest.raises(OSError, match="Permission"), explained_disk_full(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")


def test_space_is_there_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve(file, tmp_path, 100_000)
        assert os.fstat(file.fileno()).st_size == 100_000
        if hasattr(os, "posix_fallocate"):
            assert os.fstat(file.fileno()).st_blocks * 512 >= 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    with (
        pytest.raises(DiskFullError, match=r"needs 0\.2 MB and has 1\.0 kB free"),
        (tmp_path / "file").open("wb") as file,
    ):
        reserve(file, tmp_path, 200_000)


def test_a_note_says_what_is_safe(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), DiskFullError(tmp_path)):
        notes = explained_interruption(lambda: "outer"), explained_interruption(lambda: "inner")
        with pytest.raises(type(error)) as raised, notes[0], notes[1]:
            raise error
        assert raised.value.__notes__ == ["inner"]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    save: Any = trainer._save_optimizer_and_scheduler

    def full(folder: str) -> None:
        if folder.endswith("-4"):
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 128 vs 22")
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(DiskFullError, match="No space left on device"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_unfinished_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    dead, fresh, other = (tmp_path / f".file-{ending}" for ending in ("abcdefgh", "ijklmnop", "no"))
    for file in (dead, fresh, other):
        file.touch()
    hours_ago = time.time() - 3600
    os.utime(dead, (hours_ago, hours_ago))
    with atomic_file(tmp_path / "file") as staged:
        os.utime(staged, (hours_ago, hours_ago))
        with atomic_file(tmp_path / "file") as second:
            second.write_text("new")
        assert staged.exists(), "its writer is alive"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file-ijklmnop", ".file-no", "file"]


def test_the_files_unused_for_longest_go_first(tmp_path: Path) -> None:
    files = [tmp_path / "of_machine" / f"{number}.json" for number in range(4)]
    files[0].parent.mkdir()
    for number, file in enumerate(files):
        file.write_text("x" * 100)
        os.utime(file, (1000 + number, 1000 + number))
    (tmp_path / "mine.txt").write_text("x" * 1000)
    mark_used(files[0])
    remove_oldest(tmp_path, 250)
    assert [file.exists() for file in files] == [True, False, False, True]
    assert (tmp_path / "mine.txt").exists()
