"""An adapter's folder: written whole or not at all, and read without building a model."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .card import model_card, provenance, usage_lines

PROVENANCE_NAME = "locft_provenance.json"
STAGING_PREFIX = ".locft-"


def save_adapter(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    record: dict[str, Any] | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a model's adapters with their provenance, so that a kill at any moment leaves the old files or the new.

    The files are PEFT's own, made by `model.save_pretrained`, and for a LocFT adapter a card and
    `locft_provenance.json`. They are written aside and then put in place at once. Other files in the folder stay.

    Args:
        model: the model whose adapters to save.
        folder: where to; it is made if it is not there.
        record: what is known of the training run, see `card.training_record`.
        state_dict: the model's state, where it had to be gathered from several processes.

    Raises:
        NotADirectoryError: if `folder` is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"Cannot save an adapter to {folder}: it is a file. Give a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.parent.glob(f"{STAGING_PREFIX}{folder.name}-*"), *folder.glob(f"{STAGING_PREFIX}*")]:
        shutil.rmtree(leftover)  # of a save that was killed
    inside = folder if folder.exists() else folder.parent
    staging = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{folder.name}-", dir=inside))
    try:
        model.save_pretrained(str(staging), state_dict=state_dict)
        for config_file in list(staging.rglob(CONFIG_NAME)):
            _describe(config_file.parent, record)
        _sync(staging)
        _put_in_place(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(adapter: Path, record: dict[str, Any] | None) -> None:
    config = PeftConfig.from_pretrained(str(adapter))
    facts = provenance(config, record)
    (adapter / PROVENANCE_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if config.peft_type == "LOCFT":
        card = model_card(config, facts, sorted(facts["base_sha256"]))
        (adapter / "README.md").write_text(card, encoding="utf-8")


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.rename(staging, folder)
    elif not (folder / CONFIG_NAME).exists() or not _exchange(staging, folder):
        # without its configuration a folder is no adapter, so a new one appears with the last of these
        for file in sorted(_files(staging), key=lambda path: path.name == CONFIG_NAME):
            target = folder / file.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    _sync_folder(folder)
    _sync_folder(folder.parent)


def _exchange(staging: Path, folder: Path) -> bool:
    """Swap the whole folder, in one step, for one with the new files and hard links to all others.

    Weights and configuration are two files, and an adapter that moved to another location needs both: replacing one
    after the other would have a moment at which they do not belong together. Returns False, with nothing changed,
    where the system cannot do it (another file system, a mount point, the process works inside the folder).
    """
    if Path.cwd().is_relative_to(folder):
        return False  # the working directory would be gone
    complete = Path(tempfile.mkdtemp(prefix=f"{STAGING_PREFIX}{folder.name}-", dir=folder.parent))
    try:
        new_files = {file.relative_to(staging) for file in _files(staging)}
        ignored = [str(folder / name) for name in new_files] + [str(staging)]

        def ignore(directory: str, names: list[str]) -> list[str]:
            return [name for name in names if os.path.join(directory, name) in ignored]

        shutil.copytree(folder, complete, copy_function=os.link, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        shutil.copytree(staging, complete, copy_function=os.link, dirs_exist_ok=True)
        shutil.copystat(folder, complete)
        _swap(complete, folder)
    except (OSError, shutil.Error):
        return False
    finally:
        # after the swap this is the old folder, before it the unused new one
        shutil.rmtree(complete, ignore_errors=True)
    return True


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
    for file in _files(folder):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What an adapter folder says about itself.

    Attributes:
        config: its `adapter_config.json`.
        tensors: name, dtype and shape of every tensor in its weights file.
        num_bytes: size of the weights file.
        facts: its `locft_provenance.json`, empty where it has none.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int
    facts: dict[str, Any]

    def __str__(self) -> str:
        rows = [
            ("method", str(getattr(self.config.peft_type, "value", self.config.peft_type))),
            ("base model", self.config.base_model_name_or_path or "not recorded"),
            ("size", f"{self.num_bytes / 1e6:.1f} MB"),
        ]
        for name, (dtype, shape) in self.tensors.items():
            rows.append(("trained", f"{_short(name)}  {dtype} {' x '.join(map(str, shape))}"))
        if "edits" in self.facts:
            recipe, losses = self.facts["recipe"], self.facts["training"]["epoch_losses"]
            rows.append(("edits", str(self.facts["edits"]["count"])))
            rows.append(("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())))
            if losses:
                rows.append(("loss", f"{losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} epochs"))
        table = "\n".join(f"{key:<12}{value}" for key, value in rows)
        return f"{table}\n\nLoad it with:\n\n{usage_lines(self.config, str(self.folder))}"


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def inspect_adapter(folder: str | os.PathLike[str]) -> AdapterSummary:
    """Read what an adapter folder holds, without its tensors' values.

    Args:
        folder: a local adapter folder, of any PEFT method.

    Raises:
        ValueError: if it is no adapter folder, or its weights are not a readable safetensors file.
    """
    folder = Path(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no adapter folder: it has no {' and no '.join(missing)}. Give the folder that "
            "`save_pretrained` or `locft train --output_dir` wrote."
        )
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            tensors = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is not a readable safetensors file ({error}). Download or save it again."
        ) from None
    facts_file = folder / PROVENANCE_NAME
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.is_file() else {}
    return AdapterSummary(folder, PeftConfig.from_pretrained(str(folder)), tensors, weights.stat().st_size, facts)
