"""Which checkpoint a run is resumed from: the newest that is whole."""

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
        output_dir: where the checkpoints of a run are.
        wanted: a checkpoint's folder; or `True`, on a command line "True", for the newest in `output_dir` that is
            whole: a kill while saving leaves one that is not.

    Raises:
        ValueError: if that checkpoint is not whole, or none in `output_dir` is.
    """
    if not isinstance(wanted, bool) and str(wanted).lower() != "true":
        if not _is_whole(Path(wanted)):
            raise ValueError(
                f"{wanted} is no whole checkpoint: it has no readable {TRAINER_STATE_NAME}. Name another, or give "
                "True for the newest one that is whole."
            )
        return Path(wanted)
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("*")]
    for _, checkpoint in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        if _is_whole(checkpoint):
            return checkpoint
    raise ValueError(
        f"{output_dir} holds no whole checkpoint to resume from. Train without resume_from_checkpoint, with "
        "save_strategy='epoch' if it should be possible to resume."
    )


def check_same_edits(checkpoint: Path, edits_sha256: str) -> None:
    """Refuse a checkpoint of a run on other edits; one without a provenance record is taken as it is.

    Raises:
        ValueError: if the record names other edits than these.
    """
    record = checkpoint / PROVENANCE_NAME
    recorded = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if recorded.get("edits", {}).get("sha256", edits_sha256) != edits_sha256:
        raise ValueError(
            f"{checkpoint} is of a run on other edits ({recorded['edits']['count']} of them). Train without "
            "resume_from_checkpoint, or into another output_dir; to go on from its weights, load it as an adapter "
            "with is_trainable=True."
        )


def invalidate(checkpoint: str | os.PathLike[str]) -> None:
    """Let a checkpoint no longer pass for whole: it is about to be written anew."""
    Path(checkpoint, TRAINER_STATE_NAME).unlink(missing_ok=True)


def _is_whole(checkpoint: Path) -> bool:
    try:
        # Trainer writes this file last
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
