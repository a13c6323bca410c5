"""Trains in two processes that talk over gloo, as torchrun starts them; test_trainer.py runs it and reads the losses.

    python two_processes.py PORT MODEL_FOLDER OUTPUT_FOLDER RECIPES

The recipes are JSON: a list of arguments of `make_trainer` with the number of edits. Forked, the two share one import.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
from tiny_training import EDITS, make_trainer, peft_model

from peft_locft.cli.commands import main


def train(rank: int, port: str, model_folder: str, output_folder: Path, recipes: list[dict[str, Any]]) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    results = []
    for recipe in recipes:
        trainer = make_trainer(output_folder, peft_model(sharp=True), EDITS[: recipe.pop("num_edits")], **recipe)
        assert trainer.args.world_size == 2
        trainer.train()
        delta = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
        results.append({"losses": trainer.epoch_losses, "delta": delta.flatten().tolist()})
    (output_folder / f"results-{rank}.json").write_text(json.dumps(results))
    train_on_the_command_line(rank, model_folder, output_folder)


def train_on_the_command_line(rank: int, model_folder: str, output_folder: Path) -> None:
    words = ["train", "--model_name_or_path", model_folder, "--edits", str(output_folder / "edits.json")]
    options = ["--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--use_cpu", "--disable_tqdm", "True"]
    with open(output_folder / f"printed-{rank}.txt", "w") as printed, contextlib.redirect_stdout(printed):
        code = main([*words, "--output_dir", str(output_folder / "adapter"), *options])
    assert code == 0


if __name__ == "__main__":
    port, model, output, recipes = sys.argv[1:]
    processes = [
        multiprocessing.get_context("fork").Process(
            target=train, args=(rank, port, model, Path(output), json.loads(recipes))
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
