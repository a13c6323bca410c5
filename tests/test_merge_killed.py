"""A kill at any moment of a merge, a merge in place or a detach leaves the old model or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import ONE_FILE

SCRIPT = Path(__file__).with_name("killed_merge_process.py")
SHARDS = "20KB"  # the edited tensors lie in two files
# the script is not in the repository's own folder, from which a process would import the package
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
ACTIONS = ("merge", "merge_in_place", "detach")


def states(folder: Path, shard_size: str, *options: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, str(SCRIPT), str(folder), *ACTIONS, "--shard_size", shard_size, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("shard_size", [ONE_FILE, SHARDS], ids=["one file", "shards"])
def test_a_process_that_dies_before_any_call_of_the_system(shard_size: str, tmp_path: Path) -> None:
    for found in states(tmp_path, shard_size, "--every_call").values():
        assert found.pop("not killed") == 1
        assert found.keys() == {"old", "new"}
        assert sum(found.values()) > 15


def test_a_process_that_is_killed_at_random_moments(tmp_path: Path) -> None:
    for found in states(tmp_path, SHARDS, "--kills", "10").values():
        assert sum(count for state, count in found.items() if state != "not killed") == 10


def test_a_gguf_file_and_a_process_that_dies_before_any_call_of_the_system(tmp_path: Path) -> None:
    for found in states(tmp_path, ONE_FILE, "--gguf", "--every_call").values():
        assert found.pop("not killed") == 1
        assert found.keys() == {"old", "new"}
        assert sum(found.values()) > 8


def test_a_gguf_file_and_a_process_that_is_killed_at_random_moments(tmp_path: Path) -> None:
    for found in states(tmp_path, ONE_FILE, "--gguf", "--kills", "10", "--intermediate_size", "2000").values():
        assert sum(count for state, count in found.items() if state != "not killed") == 10
