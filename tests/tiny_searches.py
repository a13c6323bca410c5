"""A search for a location on a tiny model, with a winner that is known: the other modules learn next to nothing."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import BreadthFirstConfig, EvaluationConfig, LocationPreset, Probe
from peft_locft.locating.module_kinds import band_of
from peft_locft.locating.preset import model_shape
from peft_locft.locating.results import LocationSearchResult
from peft_locft.workflows.locate import SearchPlan, search_locations

PROBED = [replace(edit, locality=(Probe("Dave is", "Louis"),), rephrasings=(f"So: {edit.prompt}",)) for edit in EDITS]
PLAN = SearchPlan(modules=["mlp", "down", "up"], layers=[1, 2], keep=3, learning_rates={"down": 1e-7, "up": 1e-7})
RELIABILITY = {"reliability_token_accuracy": 1.0}


def recipe(folder: Path, **arguments: Any) -> BreadthFirstConfig:
    settings = {"num_train_epochs": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "use_cpu": True}
    return BreadthFirstConfig(output_dir=str(folder), disable_tqdm=True, **(settings | arguments))


def search(folder: Path, model: Any = None, edits: Any = PROBED, **arguments: Any) -> LocationSearchResult:
    """Search on the tiny model for what is learned best, asking for tokens alone unless `arguments` say otherwise."""
    defaults: dict[str, Any] = {"plan": replace(PLAN, num_rungs=2), "score": RELIABILITY, "num_edits": None}
    defaults["evaluation"] = EvaluationConfig(protocols=["token_accuracy"], num_resamples=50)
    return search_locations(
        base_model(sharp=True) if model is None else model,
        make_tokenizer("llama2"),
        edits,
        recipe(folder, **arguments.pop("recipe", {})),
        **(defaults | arguments),
    )


def without_seconds(found: LocationSearchResult) -> list[dict[str, Any]]:
    """Return the trials of a search but for how long they took."""
    rows = [asdict(trial) for trial in found.trials]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def preset_for(
    model: Any, module: str = "up", layer: int = 1, num_layers: int = 1, gradient_tokens: str | None = None
) -> LocationPreset:
    """Return a preset as a search writes it."""
    location = band_of(model, module, layer, num_layers)
    names = (location.target_modules, location.target_parameters)
    shape, found = model_shape(model.config), {"score": {"perplexity": 1.0}}
    return LocationPreset(module, layer, *names, 2e-3, shape, found, num_layers, gradient_tokens)
