"""Saving an adapter with its provenance and card, all of it or nothing."""

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
from .shipped_edits import EDITS_NAME, ship_edits
from .shrinking import check_shrinking, shrink_files

# an adapter's folder, put in place at once: weights and configuration belong together
adapter_folder = partial(atomic_folder, what="an adapter", main_file=CONFIG_NAME, optional_files=(EDITS_NAME,))


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

    The files are those of `model.save_pretrained`, `locft_provenance.json`, and for a LocFT adapter a card. They are
    written aside and put in place at once. Other files in the folder stay.

    Args:
        model: the model with the adapters.
        folder: the folder to save to; it is made if it is not there.
        record: provenance of the training run, see `training.record.training_record`.
        report: evaluation of the active adapters, for the card.
        edits: the edits that the active adapters were trained on, to ship them beside the weights. Everyone who has
            the adapter can then read them.
        state_dict: the model's state, if it was gathered from several processes.
        delta_dtype: dtype of the saved deltas: `"float32"`, `"bfloat16"` or `"float16"`; `None` leaves them as they
            are.
        density: share of a delta's values that are saved, the largest relative to their weight (RECT). The others are
            zeros: the file has the same size and compresses better.

    `delta_dtype` and `density` change the saved adapter, not the model: evaluate the saved one.

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
            "report: it was measured on the deltas as they are, and delta_dtype or density saves others. Save the "
            "adapter, load and evaluate it, and give its report to describe_adapter."
        )
    with adapter_folder(folder) as staging:
        model.save_pretrained(str(staging), state_dict=state_dict)
        for config_file in list(staging.rglob(CONFIG_NAME)):
            adapter_name = "default" if config_file.parent == staging else config_file.parent.name
            config = PeftConfig.from_pretrained(str(config_file.parent))
            # the record belongs to the adapters that the run trained, not to others that were loaded beside them
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
    """Rewrite the card and the provenance of a saved adapter, with the results of an evaluation.

    Args:
        folder: a local adapter folder.
        report: the return value of `evaluate_edits`; `None` keeps the recorded results.
        edits: the edits that it was trained on, to ship them beside the weights; `None` leaves what is there.

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
    """Write `locft_provenance.json` and the card into an adapter's folder.

    PEFT's card of another method's adapter stays, unless the adapter is an export of ours.
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
        f"density: {parameter} is not here in full (quantized, offloaded or sharded), and density needs it. Save "
        "the adapter as it is, and use export_small with the base's checkpoint."
    )
