"""Updates an adapter in its own folder in child processes that die while they save; test_lifelong.py runs it.

    python killed_update_process.py ADAPTER FOLDER

Every child has its own copy of ADAPTER in FOLDER, and dies before another call of the system that changes files.
`FOLDER/died.json` says which of them did.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

from dying_processes import die_at
from saving_process import CALLS
from tiny_training import EDITS

import peft_locft.workflows.update
from peft_locft import BreadthFirstConfig, update_adapter
from peft_locft.workflows.update import ContinuedTrainer

NUM_CALLS = (0, 8, 10, 12, 14, 1000)


def update(folder: Path, num_calls: int) -> None:
    save = ContinuedTrainer.save_model

    def dying(*args: Any, **kwargs: Any) -> None:
        die_at(num_calls, CALLS)
        save(*args, **kwargs)

    ContinuedTrainer.save_model = dying  # type: ignore[method-assign]
    peft_locft.workflows.update._has_failed = lambda outcomes: False  # one epoch withdraws nothing; here it is saved
    args = BreadthFirstConfig(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True
    )
    update_adapter(folder, forget=[EDITS[0].prompt], args=args)


if __name__ == "__main__":
    adapter, folder = map(Path, sys.argv[1:])
    died = []
    for number, num_calls in enumerate(NUM_CALLS):
        copy = shutil.copytree(adapter, folder / str(number))
        child = multiprocessing.get_context("fork").Process(target=update, args=(copy, num_calls))
        child.start()
        child.join()
        died.append(child.exitcode != 0)
    (folder / "died.json").write_text(json.dumps(died))
