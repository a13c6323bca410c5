"""Finds the checkpoint to resume from: the newest complete one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..adapters.saving import PROVENANCE_NAME


def whole_checkpoint(output_dir: str | os.PathLike[str], wanted: str | os.PathLike[str] | bool) -> Path:
    """Return the checkpoint to resume from.

    Args:
        output_dir: the folder with the checkpoints of a run.
        wanted: a checkpoint's folder; or `True` ("True" on a command line) for the newest complete one in
            `output_dir`: a kill while saving leaves an incomplete one.

    Raises:
        ValueError: if that checkpoint is incomplete, or none in `output_dir` is complete.
    """
    if not isinstance(wanted, bool) and str(wanted).lower() != "true":
        if not is_whole(Path(wanted)):
            raise ValueError(
                f"{wanted} is no complete checkpoint: it has no readable {TRAINER_STATE_NAME}. Name another, or use "
                "True for the newest complete one."
            )
        return Path(wanted)
    for checkpoint in reversed(checkpoints_in(output_dir)):
        if is_whole(checkpoint):
            return checkpoint
    raise ValueError(
        f"{output_dir} holds no complete checkpoint to resume from. Train without resume_from_checkpoint; with "
        "save_strategy='epoch' the run can be resumed."
    )


def checkpoints_in(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a folder, complete or not, in the order of their steps."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match and path.is_dir())]


def check_same_edits(checkpoint: Path, edits_sha256: str) -> None:
    """Check that a checkpoint is of a run on these edits, if it has a provenance file.

    Raises:
        ValueError: if the provenance file names other edits.
    """
    provenance = checkpoint / PROVENANCE_NAME
    recorded = json.loads(provenance.read_text(encoding="utf-8")) if provenance.is_file() else {}
    if recorded.get("edits", {}).get("sha256", edits_sha256) != edits_sha256:
        raise ValueError(
            f"{checkpoint} is of a run on {recorded['edits']['count']} other edits. Train without "
            "resume_from_checkpoint, or with another output_dir. To continue from its weights, load it as an adapter "
            "with is_trainable=True."
        )


def invalidate(checkpoint: str | os.PathLike[str]) -> None:
    """Mark a checkpoint as incomplete before it is written again."""
    Path(checkpoint, TRAINER_STATE_NAME).unlink(missing_ok=True)


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete."""
    try:
        # Trainer writes this file last
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
