"""Saves or merges to a folder and stops in the middle; test_two_writers.py runs it and does the same meanwhile.

Each line of its input is an order in JSON: the action and the folder. It answers "open" when the files are written
aside, waits for another line, puts them in place, and answers "done" or what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
from saving_process import make_adapter

from peft_locft import merge_checkpoint, save_adapter
from peft_locft.io import folders


def main(base: Path, adapter: Path) -> None:
    own = folders._sync

    def wait(folder: Path) -> None:
        own(folder)
        print("open", flush=True)
        sys.stdin.readline()

    folders._sync = wait
    model = make_adapter("up")
    print("ready", flush=True)
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        try:
            if order["action"] == "save":
                save_adapter(model, order["folder"])
            else:
                merge_checkpoint(base, [adapter], order["folder"])
            print("done", flush=True)
        except ValueError as error:
            print(error, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*map(Path, sys.argv[1:]))
