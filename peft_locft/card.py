"""The model card and the provenance record of an adapter."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft import PeftConfig

from .batches import LossRecord
from .edits import Edit, edits_sha256
from .recipe import BreadthFirstConfig

RECIPE_FIELDS = (
    "objective",
    "loss_averaging",
    "edit_order",
    "append_eos",
    "chat_template",
    "loss_floor",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "weight_decay",
    "lr_scheduler_type",
    "max_grad_norm",
    "seed",
)
PACKAGES = ("peft-locft", "peft", "transformers", "torch")


def training_record(
    edits: Sequence[Edit],
    args: BreadthFirstConfig,
    losses: LossRecord,
    num_steps: int,
    evaluations: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a training run leaves in `locft_provenance.json`: the edits' hash, the recipe, the losses.

    `evaluations` are what an `EvaluationCallback` has left: its `curves`, and the `kept_epoch` where it chose one.
    """
    recipe = {name: getattr(args, name) for name in RECIPE_FIELDS}
    return {
        "edits": {"count": len(edits), "sha256": edits_sha256(edits)},
        "recipe": {name: getattr(value, "value", value) for name, value in recipe.items()},
        "training": {"steps": num_steps, "epoch_losses": list(losses.epoch_losses), **(evaluations or {})},
    }


def provenance(config: PeftConfig, record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of `locft_provenance.json`: what the adapter belongs to and how it was made.

    Args:
        config: the adapter's configuration, as it is being saved.
        record: what [`training_record`] returned, where a run of ours made the adapter.
    """
    return {
        "format": 1,
        "base_model": {"name_or_path": config.base_model_name_or_path, "revision": config.revision},
        "base_sha256": getattr(config, "base_sha256", None) or {},
        **(record or {}),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def usage_lines(config: PeftConfig, adapter: str) -> str:
    """Return the lines of Python that load an adapter."""
    registers = "import peft_locft  # registers LOCFT with PEFT\n" if config.peft_type == "LOCFT" else ""
    # a string of JSON is one of Python too, whatever quotes and backslashes are in a folder's name
    name = json.dumps(adapter, ensure_ascii=False)
    return (
        f"{registers}from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({name})\n"
    )


def model_card(config: PeftConfig, facts: dict[str, Any], location: Sequence[str]) -> str:
    """Return the text of the adapter's README.md.

    Args:
        config: the adapter's configuration.
        facts: the content of `locft_provenance.json`.
        location: names of the base tensors that have a delta.
    """
    base = config.base_model_name_or_path or ""
    # a path on somebody's machine is no Hub id, and the Hub refuses it in the card's header
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) is not None and not Path(base).exists()
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["peft", "locft", "model-editing", "knowledge-editing"],
    )
    rows = [
        f"- **Base model**: `{base or 'not recorded'}`",
        f"- **Location**: {', '.join(f'`{n}`' for n in location)}",
    ]
    if "edits" in facts:
        rows.append(f"- **Edits**: {facts['edits']['count']} (sha256 `{facts['edits']['sha256'][:16]}…`)")
        recipe = facts["recipe"]
        rows.append(
            f"- **Recipe**: {recipe['edit_order'].replace('_', '-')}, objective `{recipe['objective']}`, learning "
            f"rate {recipe['learning_rate']:g}, batches of {recipe['per_device_train_batch_size']}"
        )
    return f"""---
{data.to_yaml()}
---

# Edited facts, as a LocFT adapter

This adapter changes what the base model answers to a list of prompts. It holds the delta alone: the base model's
weights are not in it, and taking it off restores them bit for bit.

{chr(10).join(rows)}

Load it (`pip install peft-locft`):

```python
{usage_lines(config, "this-repository")}```

Merge it: `model = model.merge_and_unload()`. The merged model answers exactly as the adapter does.

The edited answers are what somebody wrote into an edits file; nothing here says that they are true.
"""
