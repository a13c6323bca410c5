"""Searches locations in child processes; test_location_processes.py runs it and looks at what they leave.

    python killed_search_process.py FOLDER KILLS

KILLS is JSON: for every child the number, from 1, of the comparison with the whole model at which it is killed; or
null.
Each goes on where the one before was killed, and writes what it has found to FOLDER/found.json. With `"together"` in
its place, two children start at once, as a launcher starts them, and call `locft locate`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
from tiny_searches import search, without_seconds

from peft_locft.cli.commands import main


def search_until(folder: Path, kill: int | None) -> None:
    import peft_locft.training.edit_runner as runner

    left = kill or 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    # in the middle of a trial: once for its layout, once for the cached states
    for name in ("find_layout", "cache_trunk"):
        setattr(runner, name, dying(getattr(runner, name)))
    found = search(folder)
    (folder / "found.json").write_text(json.dumps(without_seconds(found)))


def locate(folder: Path, rank: int) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    os.environ |= {name: str(value) for name, value in where.items()}
    words = ["--model_name_or_path", str(folder / "base"), "--edits", str(folder / "edits.json"), "--use_cpu"]
    plan = ["--modules", "down", "up", "--layers", "1", "2", "--num_rungs", "2", "--num_train_epochs", "2"]
    asked = ["--score", "reliability_token_accuracy", "--learning_rates", "up=1e-7", "--num_edits", "8"]
    with open(folder / f"printed-{rank}.txt", "w") as printed, contextlib.redirect_stdout(printed):
        code = main(["locate", *words, "--output_dir", str(folder / "out"), *plan, *asked])
    sys.exit(code)


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])
    context = multiprocessing.get_context("fork")
    codes = []
    if kills == "together":
        children = [context.Process(target=locate, args=(folder, rank)) for rank in (0, 1)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            codes.append(child.exitcode)
    else:
        for kill in kills:
            child = context.Process(target=search_until, args=(folder, kill))
            child.start()
            child.join()
            codes.append(child.exitcode)
    (folder / "codes.json").write_text(json.dumps(codes))
