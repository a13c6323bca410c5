"""Runs commands in child processes that get a real signal on the way; test_stopping.py looks at what they leave.

    python stopped_process.py FOLDER RUNS

RUNS is JSON: for every child the signal, the number of the call in which it arrives, the module and function of the
call, and the words after `locft`. FOLDER gets `codes.json`, and the standard error of every child, by its number.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import operator
import os
import signal
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
import dying_processes  # noqa: F401  (bars with locks of their own)

import peft_locft.workflows.train
from peft_locft.cli.commands import main


def run(place: Path, number: int, left: int, module: str, name: str, words: list[str]) -> None:
    # a shell starts what runs in its background with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (place.with_suffix(".err")).open("wb") as file:
        os.dup2(file.fileno(), 2)
    owner, _, last = name.rpartition(".")
    target: Any = importlib.import_module(module)
    target = operator.attrgetter(owner)(target) if owner else target
    call = getattr(target, last)

    def stopped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    setattr(target, last, stopped)
    sys.exit(main(words))


if __name__ == "__main__":
    assert peft_locft.workflows.train  # imported once, for all children
    folder, codes = Path(sys.argv[1]), []
    for index, arguments in enumerate(json.loads(sys.argv[2])):
        child = multiprocessing.get_context("fork").Process(target=run, args=(folder / str(index), *arguments))
        child.start()
        child.join()
        codes.append(child.exitcode)
    (folder / "codes.json").write_text(json.dumps(codes))
