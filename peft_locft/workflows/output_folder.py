"""The output folder of a job: what must not be lost in it, and what is safe when the job is stopped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from ..io.disk_space import check_room
from ..io.files import check_folder
from ..training.config import BreadthFirstConfig
from ..training.resume import checkpoints_in, whole_checkpoint

CONTINUE = "--resume_from_checkpoint True"
OVERWRITE = "--overwrite_output_dir"
# files of a model in the formats of transformers
MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "*.gguf")


def check_output_folder(
    output_dir: str | os.PathLike[str] | None,
    *,
    overwrite: bool = False,
    own_adapter: str | os.PathLike[str] | None = None,
    what: str = "an adapter",
) -> Path:
    """Check, before any work, that a job loses nothing when it writes to a folder; return the folder.

    Args:
        output_dir: the folder; it need not exist.
        overwrite: allow a folder that holds an adapter, a model, or the checkpoints of an interrupted run.
        own_adapter: an adapter that the job replaces by a new version, and which may be in that folder.
        what: what the job writes, for the message.

    Raises:
        ValueError: if no folder is given; if it holds such a thing and `overwrite` is False.
        NotADirectoryError: if it, or a parent, is a file.
    """
    if output_dir is None:
        raise ValueError(f"output_dir is missing: the folder to save {what} to. Give one: output_dir='out'.")
    check_folder(output_dir, what)
    folder = Path(output_dir)
    if overwrite or not folder.is_dir():
        return folder
    checkpoint = interrupted_run(folder)
    if checkpoint is not None:
        raise ValueError(
            f"{folder} holds the checkpoints of a run that did not end; the newest is {checkpoint.name}. To go on "
            f"with that run, add {CONTINUE}. To begin again, add {OVERWRITE}, which removes these checkpoints, or "
            "choose another output_dir."
        )
    held = _held(folder)
    is_own = own_adapter is not None and folder.resolve() == Path(own_adapter).resolve()
    if held is not None and not (is_own and held == "an adapter"):
        raise ValueError(
            f"{folder} already holds {held}. Nothing was changed. Choose another output_dir, or add {OVERWRITE} to "
            f"save {what} there all the same."
        )
    return folder


def check_training_folder(args: BreadthFirstConfig, own_adapter: str | os.PathLike[str] | None = None) -> Path:
    """Check the output folder of a training, see [`check_output_folder`]; a run that is resumed may use its own."""
    resumes = bool(args.resume_from_checkpoint)
    folder = check_output_folder(
        args.output_dir, overwrite=args.overwrite_output_dir or resumes, own_adapter=own_adapter
    )
    if resumes:
        whole_checkpoint(folder, args.resume_from_checkpoint or True)
    return folder


def begin_again(args: BreadthFirstConfig) -> None:
    """Remove the checkpoints of earlier runs, if a training overwrites them; a later resume would take them."""
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.should_save:
        for checkpoint in checkpoints_in(args.output_dir or ""):
            shutil.rmtree(checkpoint)


def check_space(folder: Path, model: nn.Module, args: BreadthFirstConfig) -> None:
    """Raise a [`DiskFullError`] if the disk has no room for what a training will save."""
    trained = sum(p.numel() * max(p.itemsize, 4) for p in model.parameters() if p.requires_grad)
    # a checkpoint holds the moments of Adam, too; an old one goes when the new one is complete
    checkpoints = 2 * 3 if args.save_strategy != "no" else 0
    if args.should_save:
        check_room(folder, trained * (1 + checkpoints))


def interrupted_run(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, if no adapter was saved there after it."""
    try:
        checkpoint = whole_checkpoint(folder, True)
    except ValueError:
        return None
    adapter = folder / SAFETENSORS_WEIGHTS_NAME
    is_done = (_written(adapter) or 0) >= (_written(checkpoint / TRAINER_STATE_NAME) or 0)
    return None if is_done else checkpoint


def _held(folder: Path) -> str | None:
    """Return what a folder holds that must not be lost, in words; `None`: nothing."""
    if any((folder / name).exists() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)):
        return "an adapter"
    if any(True for pattern in MODEL_FILES for _ in folder.glob(pattern)):
        return "a model"
    return None


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def what_training_leaves(folder: Path, what: str = "adapter") -> Callable[[], str]:
    """Return a function that says, when a training was stopped, what is in its folder and how to go on.

    Call it before the training, to know what was there.
    """
    adapter = folder / SAFETENSORS_WEIGHTS_NAME
    before = _written(adapter)

    def describe() -> str:
        checkpoint, now = interrupted_run(folder), _written(adapter)
        if now is not None and now != before:
            return f"The new {what} in {folder} is complete."
        unchanged = f"The {what} in {folder} is as it was before."
        if checkpoint is not None:
            kept = "" if now is None else f" {unchanged}"
            return f"{checkpoint} is complete.{kept} To go on from there, run the same command with {CONTINUE}."
        unfinished = unchanged if now is not None else f"Nothing was written to {folder}."
        return f"{unfinished} Run the same command to begin again (with --save_strategy epoch, a run can go on)."

    return describe


def what_trials_leave(folder: Path, pattern: str) -> Callable[[], str]:
    """Return a function that says how many results a stopped search or comparison has stored."""

    def describe() -> str:
        number = len(list(folder.glob(pattern)))
        return f"{number} finished trials are kept in {folder}. Run the same command to go on with the others."

    return describe
