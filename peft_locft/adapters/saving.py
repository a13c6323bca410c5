"""Saves an adapter with its provenance and card, atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..data.edits import Edit
from ..evaluation.report import EvaluationReport
from ..io.files import sha256_of_file, write_atomically
from ..io.folders import atomic_folder
from ..tuner.model import locft_layers
from .card import CARD_NAME, location_of, model_card
from .provenance import PROVENANCE_NAME, Provenance, TrainingRun
from .reading import check_adapter
from .scope import SCOPE_NAME
from .shipped_edits import EDITS_NAME, ship_edits
from .shrinking import check_shrinking, shrink_files

# atomic, since weights and configuration must match
adapter_folder = partial(
    atomic_folder, what="an adapter", main_file=CONFIG_NAME, optional_files=(EDITS_NAME, SCOPE_NAME)
)


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
    """Save a model's adapters with their provenance. A kill at any moment leaves the old files or the new ones.

    The files are those of `model.save_pretrained`, `locft_provenance.json`, and a card for a LocFT adapter. Other
    files in the folder stay. `delta_dtype` and `density` change the saved adapter, not the model: evaluate the saved
    one.

    Args:
        model: the model with the adapters.
        folder: the folder to save to, created if needed.
        record: provenance of the training run, see `training.record.training_record`.
        report: evaluation of the active adapters, for the card.
        edits: the edits that the active adapters were trained on, to save them beside the weights. Everyone who has
            the adapter can then read them.
        state_dict: the model's state, if it was gathered from several processes.
        delta_dtype: dtype of the saved deltas: `"float32"`, `"bfloat16"` or `"float16"`; `None`: unchanged.
        density: share of a delta's values to keep, the largest relative to their weight (RECT). The others become
            zero: the file has the same size and compresses better.

    Raises:
        ValueError: if `delta_dtype` or `density` is out of range, is given for another method than LocFT, or is given
            with a `report`, which does not describe the changed deltas; if a value is too large for the dtype; if a
            base weight that `density` needs is quantized, offloaded or sharded; if `edits` do not match `record`.
        NotADirectoryError: if `folder` or a parent is a file.
    """
    if not isinstance(model, PeftModel):
        found = f"found a {type(model).__name__} without an adapter"
        raise ValueError(f"save_adapter: {found}; expected a PeftModel. A whole model is saved by save_pretrained.")
    smaller = delta_dtype is not None or density is not None
    check_shrinking(delta_dtype, density)
    if smaller and report is not None:
        raise ValueError(
            "report: it describes the unchanged deltas, but delta_dtype or density changes them. Save the adapter "
            "without a report, load and evaluate it, and pass that report to describe_adapter."
        )
    with adapter_folder(folder) as staging:
        model.save_pretrained(str(staging), state_dict=state_dict)
        for config_file in list(staging.rglob(CONFIG_NAME)):
            adapter_name = "default" if config_file.parent == staging else config_file.parent.name
            config = PeftConfig.from_pretrained(str(config_file.parent))
            # the record describes the trained adapters only, not others in the model
            active = adapter_name in model.active_adapters
            provenance = Provenance.of_config(config, record if active else None, report if active else None)
            if smaller:
                base = partial(_base_weight, model, adapter_name)
                checked = check_adapter(config_file.parent)
                shrunk = shrink_files(checked, config_file.parent, base, delta_dtype, density)
                provenance = replace(provenance, shrunk=shrunk)
            if edits is not None and active:
                ship_edits(config_file.parent, edits, provenance.run)
            write_description(config_file.parent, config, provenance)


def describe_adapter(
    folder: str | os.PathLike[str], *, report: EvaluationReport | None = None, edits: Sequence[Edit] | None = None
) -> None:
    """Rewrite the card and the provenance of a saved adapter, for instance with evaluation results.

    Args:
        folder: a local adapter folder.
        report: the return value of `evaluate_edits`; `None`: keep the recorded results.
        edits: the edits that it was trained on, to save them beside the weights; `None`: no change.

    Raises:
        ValueError: if `check_adapter` refuses the folder, or `edits` do not match the provenance.

    Example:
        >>> describe_adapter("out", report=evaluate_edits(model, tokenizer, "edits.jsonl"))
    """
    adapter = check_adapter(folder, method=None)
    recorded, current = adapter.provenance, Provenance.of_config(adapter.config)
    if edits is not None:
        ship_edits(adapter.folder, edits, recorded.run)
    provenance = replace(
        recorded,
        base_model=current.base_model,  # the cache may now know its commit or licence
        base_sha256=recorded.base_sha256 or current.base_sha256,
        evaluation=report or recorded.evaluation,
        versions=recorded.versions or current.versions,
    )
    write_description(adapter.folder, adapter.config, provenance)


def write_description(folder: Path, config: PeftConfig, provenance: Provenance) -> None:
    """Write `locft_provenance.json` and the card into an adapter's folder.

    For other methods, PEFT's card stays, unless the adapter is an export.
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
        f"density: the base weight {parameter} is quantized, offloaded or sharded; expected it whole in memory. "
        "Save the adapter without density, and use export_small with the base's checkpoint."
    )
