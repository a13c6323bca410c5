"""Kills merges, merges in place and detaches, and looks at what they leave: test_merge_killed.py runs it.

    python tests/killed_merge_process.py FOLDER ACTION... --every_call
    python tests/killed_merge_process.py FOLDER ACTION... --kills 100 --intermediate_size 20000

ACTION is `merge`, `merge_in_place` or `detach`, of a folder, or with --gguf of a GGUF file. Either the process dies
before every call of the system, one after the other, that changes a file, or it is killed at so many random moments.
The process that ends what it left is killed too, and then comes one that is not. After every kill, and before any
other call of ours, transformers loads what is there (of a GGUF file, its bytes are compared). Prints, for each action,
how often that was the old model and how often the new one, bit for bit. Anything else ends it with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import conftest  # noqa: F401  (offline, one thread)
import torch
from dying_processes import die_at
from tiny_checkpoints import ONE_FILE, edit, save_base, snapshot
from tiny_gguf import save_gguf
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, detach, merge_checkpoint, merge_in_place
from peft_locft.io import gguf_file, patched_file
from peft_locft.merging import detach_gguf, gguf_undo, in_place, merge_gguf, merge_gguf_in_place

SYSTEM_CALLS = ("chmod", "copy_file_range", "fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")
CALLS = [
    *((os, name) for name in SYSTEM_CALLS),
    *((module, "write_all") for module in (patched_file, in_place, gguf_undo, gguf_file)),
]


@dataclass
class Case:
    """A model, old and new, and an action on it."""

    folder: Path
    action: str

    def __post_init__(self) -> None:
        self.old, self.new, self.merged = (self.folder / name for name in ("old", "new", "merged"))
        self.adapter, self.work = self.folder / "adapter", self.folder / "work" / "model"

    def make(self, shard_size: str, intermediate_size: int) -> None:
        self.folder.mkdir(parents=True)
        save_base(self.old, shard_size=shard_size, intermediate_size=intermediate_size)
        edit(self.old, self.adapter, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]))
        merge_checkpoint(self.old, [self.adapter], self.new)
        self.old_tensors, self.new_tensors = loaded(self.old), loaded(self.new)
        shutil.copytree(self.old, self.merged)
        num_files = len(merge_in_place(self.merged, [self.adapter]).written)
        assert num_files == (1 if shard_size == ONE_FILE else 2), f"{num_files} files are edited"

    def prepare(self) -> None:
        """Make the place on which the action works."""
        shutil.rmtree(self.work.parent, ignore_errors=True)
        self.work.parent.mkdir()
        if self.action != "merge":
            shutil.copytree(self.merged if self.action == "detach" else self.old, self.work)

    def act(self) -> None:
        if self.action == "merge":
            merge_checkpoint(self.old, [self.adapter], self.work)
        elif self.action == "merge_in_place":
            merge_in_place(self.work, [self.adapter])
        else:
            detach(self.work)

    def state(self) -> str:
        """Return which model transformers loads, bit for bit: `"old"` or `"new"`."""
        if not self.work.exists():
            assert self.action == "merge"
            return "old"
        found = loaded(self.work)
        if self.action == "merge":
            assert snapshot(self.work) == snapshot(self.new), "a new folder that is not whole"
        for name, tensors in (("old", self.old_tensors), ("new", self.new_tensors)):
            if found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors):
                return name
        raise AssertionError("a third model")

    def check_next(self) -> None:
        """Assert that the next call ends with the new model, and that it comes off."""
        before = snapshot(self.old)
        if self.action == "merge":
            if not self.work.exists():
                self.act()
            assert snapshot(self.work) == snapshot(self.new)
            assert [path.name for path in self.work.parent.iterdir()] == [self.work.name], "something is left"
        else:
            with suppress(ValueError):  # merged already, or nothing to detach
                self.act()
            if self.action == "merge_in_place":
                assert snapshot(self.work) == snapshot(self.merged)
                detach(self.work)
            assert snapshot(self.work) == before
        assert snapshot(self.old) == before, "the base was changed"


class GGUFCase(Case):
    """A GGUF file, old and new, and an action on it."""

    def __post_init__(self) -> None:
        self.old, self.new = self.folder / "old.gguf", self.folder / "new.gguf"
        self.adapter, self.work = self.folder / "adapter", self.folder / "work" / "model.gguf"

    def make(self, shard_size: str, intermediate_size: int) -> None:
        self.folder.mkdir(parents=True)
        base = save_base(self.folder / "base", intermediate_size=intermediate_size)
        edit(base, self.adapter, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]))
        save_gguf(base, self.old, "F16")  # rows of any length
        merge_gguf(self.old, self.adapter, self.new, tensor_type="F32")  # everything behind them moves

    def prepare(self) -> None:
        shutil.rmtree(self.work.parent, ignore_errors=True)
        self.work.parent.mkdir()
        if self.action != "merge":
            shutil.copy(self.old, self.work)
        if self.action == "detach":
            merge_gguf_in_place(self.work, self.adapter, tensor_type="F32")

    def act(self) -> None:
        if self.action == "merge":
            merge_gguf(self.old, self.adapter, self.work, tensor_type="F32")
        elif self.action == "merge_in_place":
            merge_gguf_in_place(self.work, self.adapter, tensor_type="F32")
        else:
            detach_gguf(self.work)

    def state(self) -> str:
        if not self.work.exists():
            assert self.action == "merge"
            return "old"
        content = self.work.read_bytes()
        if content == self.new.read_bytes():
            return "new"
        assert content == self.old.read_bytes() and self.action != "merge", "a third model"
        return "old"

    def check_next(self) -> None:
        with suppress(ValueError):  # merged already, or nothing to detach
            self.act()
        if self.action == "merge_in_place":
            assert self.state() == "new"
            detach_gguf(self.work)
        assert self.state() == ("new" if self.action == "merge" else "old")
        # the unfinished file of a killed process stays for a minute, in which it may belong to a living one
        left = [path.name for path in self.work.parent.rglob("*") if path.is_file() and path != self.work]
        assert all(name.startswith(".model.gguf") for name in left), f"something is left: {left}"


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Return the bits of every tensor of the model that transformers loads."""
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(about.values()), f"{folder} is not whole: {about}"
    return {name: tensor.view(torch.int32) for name, tensor in model.state_dict().items()}


def in_child(call: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 3
        # of a second one: merged already, or nothing to detach
        with suppress(ValueError):
            call()
            code = 0
        os._exit(code)
    return child


def act_until(case: Case, num_calls: int) -> int:
    """Run the action in a process that dies at this call, if it comes so far, and return its exit code."""

    def act() -> None:
        die_at(num_calls, CALLS)
        case.act()

    return os.waitstatus_to_exitcode(os.waitpid(in_child(act), 0)[1])


def killed_before_every_call(case: Case) -> Iterator[bool]:
    """Yield after every kill; the last time for the action that was not killed."""
    num_calls, code = 0, 1
    while code == 1:
        case.prepare()
        code = act_until(case, num_calls)
        assert code in (0, 1), f"the action failed with {code}"
        yield code == 1
        num_calls += 1


def killed_at_random(case: Case, kills: int, seed: int) -> Iterator[bool]:
    """Yield after every run of the action, until so many were killed in the middle."""
    durations = []
    for _ in range(3):
        case.prepare()
        begun = time.perf_counter()
        assert os.waitpid(in_child(case.act), 0)[1] == 0
        durations.append(time.perf_counter() - begun)
    draw = random.Random(seed)
    while kills:
        case.prepare()
        child = in_child(case.act)
        time.sleep(draw.uniform(0, min(durations)))
        os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] != 0
        kills -= killed
        yield killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("actions", nargs="+", choices=["merge", "merge_in_place", "detach"])
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--every_call", action="store_true")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_size", default=ONE_FILE)
    parser.add_argument("--intermediate_size", type=int, default=48)
    options = parser.parse_args()
    if options.every_call:
        # what a process has written is there after its death; the wait for the disk is for a machine that goes down
        os.fsync = lambda fd: None
    states = {}
    for action in options.actions:
        case = (GGUFCase if options.gguf else Case)(options.folder / action, action)
        case.make(options.shard_size, options.intermediate_size)
        kills = killed_at_random(case, options.kills, options.seed)
        found: Counter[str] = Counter()
        for index, killed in enumerate(killed_before_every_call(case) if options.every_call else kills):
            found[case.state() if killed else "not killed"] += 1
            if killed:
                act_until(case, index % 11)
                case.state()
            case.check_next()
        states[action] = found
    print(json.dumps(states))


if __name__ == "__main__":
    main()
