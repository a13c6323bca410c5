"""Summarizes an adapter folder, and verifies it without building a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.checkpoint import Checkpoint
from ..io.disk_space import size
from ..io.files import sha256_of_file
from .card import usage_lines
from .edited_parameters import edited_parameters
from .provenance import Provenance, printable
from .reading import SAFETENSORS_WEIGHTS_NAME, CheckedAdapter, check_adapter
from .shipped_edits import EDITS_NAME, shipped_edits

LABEL_WIDTH = 15


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """Summary of an adapter folder: its content, its provenance, and the verified facts.

    Attributes:
        folder: the folder.
        config: its `adapter_config.json`, see `CheckedAdapter`.
        tensors: dtype and shape of every tensor in the weights file, by name.
        num_bytes: size of the weights file.
        provenance: its `locft_provenance.json`; empty if there is no such file.
        verified: the verified facts, one sentence each.
    """

    folder: Path
    config: Any
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int
    provenance: Provenance
    verified: tuple[str, ...]

    def __str__(self) -> str:
        recorded = ((label, value.replace("`", "")) for label, value in self.provenance.rows(detailed=True))
        rows = [*self._content(), *recorded, *(("verified", fact) for fact in self.verified)]
        table = "\n".join(f"{label:<{LABEL_WIDTH}}{value}" for label, value in rows)
        return f"{table}\n\nLoad it with:\n\n{usage_lines(self.config, str(self.folder))}"

    def _content(self) -> Iterator[tuple[str, str]]:
        config: Any = self.config
        base = self.provenance.base_model
        yield "method", str(getattr(config.peft_type, "value", config.peft_type))
        revision = base.commit or config.revision
        at_revision = f" at {revision}" if revision else ""
        yield "base model", printable(f"{config.base_model_name_or_path or 'not recorded'}{at_revision}")
        if base.license:
            yield "licence", f"{printable(base.license_name or base.license)}, of the base model"
        yield "size", size(self.num_bytes)
        for name, (dtype, shape) in self.tensors.items():
            short = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield "trained", f"{short}  {dtype} {' x '.join(map(str, shape))}"
        if getattr(config, "scale", 1.0) != 1.0 and config.peft_type == "LOCFT":
            yield "scale", f"{config.scale:g}"


def inspect_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, revision: str | None = None
) -> AdapterSummary:
    """Return a summary of an adapter folder, after `check_adapter` and a check that all values are finite.

    Args:
        folder: a local adapter folder, of any PEFT method.
        base: a base model, as a folder or a name on the Hub, to verify: it must have the tensors that the adapter was
            trained on. Only LocFT adapters record them.
        revision: branch, tag or commit of the base on the Hub.

    Raises:
        ValueError: if `check_adapter` refuses the folder; if a value is NaN or infinite; if the weights, the shipped
            edits or the base's tensors do not match their recorded sha256; if `base` is given, but the adapter records
            no base tensors.
        OSError: if the base cannot be downloaded.

    Example:
        >>> print(inspect_adapter("out", "Qwen/Qwen2.5-7B-Instruct"))
    """
    adapter = check_adapter(folder, method=None)
    verified = [_verified_values(adapter), _verified_file(adapter), _verified_edits(adapter)]
    if base is not None:
        verified.append(_verified_base(adapter, base, revision))
    tensors = {name: (entry.dtype, entry.shape) for name, entry in sorted(adapter.tensors.items())}
    return AdapterSummary(
        adapter.folder, adapter.config, tensors, adapter.num_bytes, adapter.provenance, tuple(filter(None, verified))
    )


def _verified_values(adapter: CheckedAdapter) -> str:
    for name in adapter.tensors:
        adapter.read(name)
    return f"all values of {len(adapter.tensors)} tensors are finite"


def _verified_file(adapter: CheckedAdapter) -> str | None:
    recorded = adapter.provenance.files.get(SAFETENSORS_WEIGHTS_NAME)
    if recorded is None:
        return None
    digest = sha256_of_file(adapter.weights_file)
    if digest != recorded:
        raise ValueError(
            f"{adapter.weights_file} has the sha256 {digest[:16]}…; expected {recorded[:16]}…, recorded when it was "
            "saved. The file is damaged or was changed. Download it again. If you changed it yourself, call "
            "describe_adapter."
        )
    return f"the weights are unchanged since they were saved, sha256 {digest[:16]}…"


def _verified_edits(adapter: CheckedAdapter) -> str | None:
    edits = shipped_edits(adapter.folder)
    if edits is None:
        return None
    match = "" if adapter.provenance.run is None else " are the edits that the adapter was trained on"
    return f"{len(edits)} edits in {EDITS_NAME}{match}"


def _verified_base(adapter: CheckedAdapter, base: str | os.PathLike[str], revision: str | None) -> str:

    recorded = getattr(adapter.config, "base_sha256", None)
    if not recorded:
        raise ValueError(
            f"{adapter.folder} does not record which base tensors it was trained on, so {base} cannot be verified. "
            "Leave out base."
        )
    parameters = edited_parameters(Checkpoint(base, revision), [adapter])
    count = sum(parameter.name in recorded for parameter in parameters)
    return f"{count} of {len(adapter.deltas)} edited tensors in {base} are the same as in training"
