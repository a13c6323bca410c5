"""The deltas of a checked adapter folder, where they lie on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import StoredTensor
from ..tuner.config import LocFTConfig
from .adapter_reading import check_adapter


@dataclass(frozen=True, slots=True)
class AdapterDeltas:
    """What a merge needs of an adapter.

    Attributes:
        folder: where it is.
        config: its `adapter_config.json`.
        deltas: where each delta lies, by the name of the base parameter that it belongs to.
    """

    folder: Path
    config: LocFTConfig
    deltas: Mapping[str, StoredTensor]


def read_deltas(folder: Path) -> AdapterDeltas:
    """Check an adapter folder, and find its deltas without reading their values.

    Args:
        folder: a local adapter folder, as `save_pretrained` or `save_adapter` wrote it.

    Raises:
        ValueError: if it is refused by `check_adapter`, or holds more than deltas.
    """
    adapter = check_adapter(folder)
    assert isinstance(adapter.config, LocFTConfig)
    others = sorted(adapter.tensors.keys() - adapter.deltas.values())
    if others:
        raise ValueError(
            f"{adapter.weights_file} holds {', '.join(others[:3])}, where only deltas are expected: whole "
            "weights (modules_to_save, trainable_token_indices) are not merged on disk. Merge this adapter with "
            "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
        )
    # a link that is changed from here on is not followed
    weights = adapter.weights_file.resolve()
    entries = {parameter: adapter.tensors[name] for parameter, name in adapter.deltas.items()}
    deltas = {
        parameter: StoredTensor(weights, entry.dtype, entry.shape, entry.start, entry.end - entry.start)
        for parameter, entry in entries.items()
    }
    return AdapterDeltas(folder, adapter.config, deltas)
