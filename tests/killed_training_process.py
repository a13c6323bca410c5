"""Trains in child processes that are killed on the way; test_trainer_killed.py runs it and looks at what they leave.

    python killed_training_process.py FOLDER KILLS

KILLS is JSON: for every child the layer (0: trunk, 1: tail) and the forward of it at which it is killed, or null. Each
goes on where the one before was killed. Prints the exit code of every child.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
from tiny_training import make_trainer, peft_model

from peft_locft import LocFTConfig


def train(folder: Path, kill: list[int] | None) -> None:
    model = peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[1]))
    trainer = make_trainer(
        folder, model, save_strategy="steps", save_steps=1, num_train_epochs=8, max_tokens_per_micro_batch=20,
        activation_cache_dir=str(folder / "states"),
    )  # fmt: skip
    if kill is not None:
        layer, left = kill

        def die(*_: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        model.get_base_model().model.layers[layer].mlp.register_forward_hook(die)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    trainer.save_model()


if __name__ == "__main__":
    folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])
    codes = []
    for kill in kills:
        child = multiprocessing.get_context("fork").Process(target=train, args=(folder, kill))
        child.start()
        child.join()
        codes.append(child.exitcode)
    (folder / "codes.json").write_text(json.dumps(codes))
