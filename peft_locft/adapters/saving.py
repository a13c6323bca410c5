"""An adapter's folder, written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..data.edits import Edit
from ..evaluation.report import EvaluationReport
from ..io.files import check_folder, current_umask, sha256_of_file, write_atomically
from ..tuner.base_weights import locft_layers
from .card import CARD_NAME, location_of, model_card
from .provenance import PROVENANCE_NAME, Provenance, TrainingRun
from .reading import check_adapter
from .shipped_edits import EDITS_NAME, ship_edits
from .shrinking import check_shrinking, shrink_files

STAGING_PREFIX = ".locft-"


def save_adapter(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    record: TrainingRun | None = None,
    report: EvaluationReport | None = None,
    edits: Sequence[Edit] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    delta_dtype: str | None = None,
    density: float | None = None,
) -> None:
    """Save a model's adapters with their provenance, so that a kill at any moment leaves the old files or the new.

    The files are PEFT's own, made by `model.save_pretrained`, and for a LocFT adapter a card and
    `locft_provenance.json`. They are written aside and then put in place at once. Other files in the folder stay.

    Args:
        model: the model whose adapters to save.
        folder: where to; it is made if it is not there.
        record: the training run that made the active adapters, see `training.record.training_record`.
        report: what an evaluation of the active adapters found, for the card.
        edits: those that the active adapters were trained on, to ship them beside the weights. Whoever has the adapter
            can read them then.
        state_dict: the model's state, where it had to be gathered from several processes.
        delta_dtype: of the deltas in the file, `"float32"`, `"bfloat16"` or `"float16"`; `None` is as they are.
        density: the share of a delta's values to save, those that are largest beside their weight (RECT); the
            others are zeros, which a compressing store or transfer saves, and the file itself does not.

    The last two change what is saved and not the model: evaluate the saved adapter.

    Raises:
        ValueError: if `delta_dtype` or `density` is out of range or comes with a `report`, which is of the deltas
            as they are; if the adapter is of another method; if a value is too large for the dtype; if a base weight
            that `density` needs is not here in full; if `edits` are not those that `record` names.
        NotADirectoryError: if `folder` or one above it is a file.
    """
    smaller = delta_dtype is not None or density is not None
    check_shrinking(delta_dtype, density)
    if smaller and report is not None:
        raise ValueError(
            "report: it is of the deltas as they are, and delta_dtype or density saves others. Save the adapter, "
            "load and evaluate that, and give its report to describe_adapter."
        )
    with atomic_folder(folder) as staging:
        model.save_pretrained(str(staging), state_dict=state_dict)
        for config_file in list(staging.rglob(CONFIG_NAME)):
            adapter_name = "default" if config_file.parent == staging else config_file.parent.name
            config = PeftConfig.from_pretrained(str(config_file.parent))
            # the run is known of the adapters that it trained, not of others that were loaded beside them
            active = adapter_name in model.active_adapters
            provenance = Provenance.of_config(config, record if active else None, report if active else None)
            if smaller:
                base = partial(_base_weight, model, adapter_name)
                found = check_adapter(config_file.parent)
                shrunk = shrink_files(found, config_file.parent, base, delta_dtype, density)
                provenance = replace(provenance, shrunk=shrunk)
            if edits is not None and active:
                ship_edits(config_file.parent, edits, provenance.run)
            write_description(config_file.parent, config, provenance)


def describe_adapter(
    folder: str | os.PathLike[str], *, report: EvaluationReport | None = None, edits: Sequence[Edit] | None = None
) -> None:
    """Write the card and the provenance of a saved adapter anew, with what an evaluation found.

    Args:
        folder: a local adapter folder.
        report: what `evaluate_edits` returned; `None` keeps the figures that are recorded.
        edits: those that the adapter was trained on, to ship them beside the weights; `None` leaves what is there.

    Raises:
        ValueError: if the folder is refused by `check_adapter`, or `edits` are not those that are recorded.

    Example:
        >>> describe_adapter("out", report=evaluate_edits(model, tokenizer, "edits.jsonl"))
    """
    adapter = check_adapter(folder, method=None)
    recorded, now = adapter.provenance, Provenance.of_config(adapter.config)
    if edits is not None:
        ship_edits(adapter.folder, edits, recorded.run)
    provenance = replace(
        recorded,
        base_model=now.base_model,  # more of the base may be known by now
        base_sha256=recorded.base_sha256 or now.base_sha256,
        evaluation=report or recorded.evaluation,
        versions=recorded.versions or now.versions,
    )
    write_description(adapter.folder, adapter.config, provenance)


def write_description(folder: Path, config: PeftConfig, provenance: Provenance) -> None:
    """Write what is known of an adapter beside its files: `locft_provenance.json`, and the card.

    The card of another method's adapter is left to PEFT, unless it is an export of ours.
    """
    files = {SAFETENSORS_WEIGHTS_NAME: sha256_of_file(folder / SAFETENSORS_WEIGHTS_NAME)}
    content = replace(provenance, files=files).to_dict()
    write_atomically(folder / PROVENANCE_NAME, json.dumps(content, indent=2, allow_nan=False) + "\n")
    if config.peft_type == "LOCFT" or provenance.export is not None:
        ships_edits = (folder / EDITS_NAME).is_file()
        card = model_card(config, provenance, location_of(config, provenance), ships_edits=ships_edits)
        write_atomically(folder / CARD_NAME, card)


def _base_weight(model: PeftModel, adapter_name: str, parameter: str) -> torch.Tensor:
    for name, layer in locft_layers(model):
        for kind, tensor in layer.base_tensors(adapter_name).items():
            if f"{name}.{kind}" == parameter and layer.quantization_backend is None:
                return tensor.cpu()
    raise ValueError(
        f"density: {parameter} is not here in full (quantized, offloaded or sharded), and what is kept depends "
        "on it. Save the adapter as it is, and use export_small with the base's checkpoint."
    )


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder for an adapter's files, and put them into `folder` at once when all of them are written.

    Args:
        folder: made if it is not there; its other files stay.

    Raises:
        NotADirectoryError: if `folder` or one above it is a file.
    """
    # a link to a folder must stay one, and what is exchanged below is the folder
    folder = Path(folder).resolve()
    check_folder(folder, "an adapter")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    inside = folder if folder.exists() else folder.parent
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{folder.name}-", dir=inside))
    try:
        yield staging
        for file in _files(staging):
            file.chmod(0o666 & ~current_umask())  # safetensors makes its files private
        _sync(staging)
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what saves that were killed left in `folder` and beside it."""
    # the ending as mkdtemp makes it: a save into "run-2" may be under way beside this one into "run"
    staging = re.compile(re.escape(f"{STAGING_PREFIX}{folder.name}-") + "[a-z0-9_]{8}")
    for place in (folder, folder.parent):
        for leftover in list(place.iterdir()) if place.is_dir() else []:
            if staging.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.chmod(0o777 & ~current_umask())  # mkdtemp makes it private
        os.rename(staging, folder)
    elif not _replaces_an_adapter(staging, folder) or not _exchange(staging, folder):
        for stale in _stale_edits(staging):
            (folder / stale).unlink(missing_ok=True)
        # without its configuration a folder is no adapter, so a new one appears with the last of these
        for file in sorted(_files(staging), key=lambda path: path.name == CONFIG_NAME):
            target = folder / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def _replaces_an_adapter(staging: Path, folder: Path) -> bool:
    return any((folder / config.relative_to(staging)).exists() for config in staging.rglob(CONFIG_NAME))


def _exchange(staging: Path, folder: Path) -> bool:
    """Swap the whole folder, in one step, for one with the new files and hard links to all others.

    Weights and configuration are two files, and an adapter that moved to another location needs both: replacing one
    after the other would have a moment at which they do not belong together. Returns False, with nothing changed,
    where the system cannot do it (another file system, a mount point, the process works inside the folder).
    """
    if Path.cwd().is_relative_to(folder):
        return False  # the working directory would be gone
    try:
        complete = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{folder.name}-", dir=folder.parent))
    except OSError:
        return False  # the folder alone can be written to
    try:
        new_files = {file.relative_to(staging) for file in _files(staging)} | _stale_edits(staging)
        ignored = [str(folder / name) for name in new_files] + [str(staging)]

        def ignore(directory: str, names: list[str]) -> list[str]:
            return [name for name in names if os.path.join(directory, name) in ignored]

        shutil.copytree(folder, complete, copy_function=os.link, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        shutil.copytree(staging, complete, copy_function=os.link, dirs_exist_ok=True)
        shutil.copystat(folder, complete)
        _sync_folder(complete)
        _swap(complete, folder)
    except (OSError, shutil.Error):
        return False
    finally:
        # after the swap this is the old folder, before it the unused new one
        shutil.rmtree(complete, ignore_errors=True)
    return True


def _stale_edits(staging: Path) -> set[Path]:
    """Return where the folder may have the edits of an adapter that is being replaced by one that ships none."""
    places = {config.parent.relative_to(staging) / EDITS_NAME for config in staging.rglob(CONFIG_NAME)}
    return {place for place in places if not (staging / place).exists()}


def _swap(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        current_folder, exchange = -100, 2
        failed = libc.renameat2(current_folder, names[0], current_folder, names[1], exchange)
    elif sys.platform == "darwin":
        failed = libc.renamex_np(*names, 2)
    else:
        raise OSError(errno.ENOSYS, "no atomic exchange of folders on this system")
    if failed:
        raise OSError(ctypes.get_errno(), f"exchanging {one} and {other}")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
