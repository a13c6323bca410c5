"""The deltas of an adapter folder, where they lie on the disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .checkpoint import FLOAT_DTYPES, StoredTensor, read_header
from .tuner.config import LocFTConfig

# base_model.model.<module>.locft_delta.<parameter>, as PEFT writes it without the adapter's name
DELTA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.locft_delta\.(?P<parameter>[^.]+)")


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
    """Read what an adapter folder holds, without the deltas' values.

    Args:
        folder: a local adapter folder, as `save_pretrained` or `save_adapter` wrote it.

    Raises:
        ValueError: if it is no adapter folder, belongs to another PEFT method, or holds more than deltas.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no adapter folder: it has no {' and no '.join(missing)}. Give the folder that "
            "`save_pretrained` or `locft train --output_dir` wrote."
        )
    config = _read_config(folder)
    found, _ = read_header(weights)
    deltas, others = {}, []
    for key, tensor in found.items():
        match = DELTA_KEY.fullmatch(key)
        if match is None or tensor.dtype not in FLOAT_DTYPES:
            others.append(key)
        else:
            deltas[f"{match['module']}.{match['parameter']}"] = tensor
    if others or not deltas:
        raise ValueError(
            f"{weights} holds {', '.join(sorted(others)[:3]) or 'nothing'}, where only deltas are expected: whole "
            "weights (modules_to_save, trainable_token_indices) are not merged on disk. Merge this adapter with "
            "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
        )
    return AdapterDeltas(folder, config, deltas)


def _read_config(folder: Path) -> LocFTConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not the configuration of a PEFT method ({error}). Download or save it again."
        ) from None
    if not isinstance(config, LocFTConfig):
        raise ValueError(
            f"{folder} is an adapter of {config.peft_type}: only those of LOCFT hold deltas that are merged on disk. "
            "Merge it with AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
        )
    return config
