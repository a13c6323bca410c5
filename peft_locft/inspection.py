"""What an adapter folder holds, read without building a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from .adapter_reading import check_adapter
from .card import usage_lines


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
            ("size", f"{self.num_bytes / 1e6:.1f} MB" if self.num_bytes >= 1e5 else f"{self.num_bytes / 1e3:.1f} kB"),
        ]
        for name, (dtype, shape) in self.tensors.items():
            rows.append(("trained", f"{_short(name)}  {dtype} {' x '.join(map(str, shape))}"))
        if "edits" in self.facts:
            recipe, losses = self.facts["recipe"], self.facts["training"]["epoch_losses"]
            rows.append(("edits", str(self.facts["edits"]["count"])))
            rows.append(("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())))
            if losses:
                unit = "edits" if recipe["edit_order"] == "depth_first" else "epochs"
                rows.append(("loss", f"{losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} {unit}"))
        table = "\n".join(f"{key:<12}{value}" for key, value in rows)
        return f"{table}\n\nLoad it with:\n\n{usage_lines(self.config, str(self.folder))}"


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def inspect_adapter(folder: str | os.PathLike[str]) -> AdapterSummary:
    """Read what an adapter folder holds, and check it: see `check_adapter`. Every value is read, and must be finite.

    Args:
        folder: a local adapter folder, of any PEFT method.

    Raises:
        ValueError: if it is no adapter folder, or one of its files cannot be read or cannot be trusted.
    """
    adapter = check_adapter(folder, method=None)
    for name in adapter.tensors:
        adapter.read(name)
    tensors = {name: (entry.dtype, entry.shape) for name, entry in sorted(adapter.tensors.items())}
    return AdapterSummary(adapter.folder, adapter.config, tensors, adapter.num_bytes, adapter.facts)
