"""The best location of a search, as a file that training reads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..io.files import write_atomically
from ..tuner.config import LocFTConfig
from ..tuner.presets import Location
from .module_kinds import config_of
from .plan import GRADIENT_TOKENS

FORMAT = "locft_location"
VERSION = 1
SHAPE = ("model_type", "num_hidden_layers", "hidden_size")


@dataclass(frozen=True)
class LocationPreset:
    """A location with its learning rate, for models of one architecture and size.

    `locft train --location` also uses the learning rate and the tokens. In Python they are arguments of
    `BreadthFirstConfig`.

    Args:
        module: the kind of module, see `location_of`.
        layer: index of the decoder layer, from 0; of a band, the first one.
        target_modules: full names of modules.
        target_parameters: full names of parameters that are not a module's weight.
        learning_rate: of the trial; `"auto"`: relative to the weights, see `BreadthFirstConfig`.
        model: `model_type`, `num_hidden_layers` and `hidden_size` that a model's configuration must have.
        found: information for readers: base, edits, score and metrics of the search.
        num_layers: number of neighbouring layers, from `layer` on.
        gradient_tokens: the tokens that wrote into the delta, see `BreadthFirstConfig`; `None`: as the recipe says.

    Example:
        >>> preset = LocationPreset.load("search/best.json")
        >>> model = get_peft_model(model, preset.config_for(model.config))
    """

    module: str
    layer: int
    target_modules: tuple[str, ...]
    target_parameters: tuple[str, ...]
    learning_rate: float | str
    model: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    num_layers: int = 1
    gradient_tokens: str | None = None

    def config_for(self, config: PretrainedConfig, where: str = "location") -> LocFTConfig:
        """Return the configuration that trains this location in a model.

        Args:
            config: the model's configuration.
            where: name of the argument or file, for the error.

        Raises:
            ValueError: if the location is for another architecture or size.
        """
        shape = model_shape(config)
        if shape != self.model:
            raise ValueError(
                f"{where}: expected {_describe(self.model)}; found {_describe(shape)}. Run `locft locate` on this "
                "model, or name the location with target_modules and layers_to_transform."
            )
        return config_of(Location(self.target_modules, self.target_parameters))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, atomically."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LocationPreset:
        """Read what [`LocationPreset.save`] wrote.

        Raises:
            ValueError: if the file cannot be read, or does not hold a location.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot read a location: {error}") from None
        try:
            if content.pop("format") != FORMAT or content.pop("version") != VERSION:
                raise ValueError("another format or version")
            names = {name: _texts(content.pop(name)) for name in ("target_modules", "target_parameters")}
            preset = cls(**(content | names))
            if not any(names.values()) or not _is_rate(preset.learning_rate):
                raise ValueError("no location, or no learning rate above 0")
            if not isinstance(preset.model, dict):
                raise ValueError("no model")
            if preset.gradient_tokens not in (None, *GRADIENT_TOKENS):
                raise ValueError(
                    f"gradient_tokens {preset.gradient_tokens!r}, not one of {', '.join(GRADIENT_TOKENS)}"
                )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: found no location ({error!r}); expected a best.json of `locft locate`, version {VERSION}."
            ) from None
        return preset


def model_shape(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields that must agree for the same names to be the same location in two models."""
    text_config: Any = config.get_text_config()
    return {name: getattr(text_config, name, None) for name in SHAPE}


def _is_rate(value: Any) -> bool:
    return value == "auto" or (isinstance(value, float) and math.isfinite(value) and value > 0)


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"found {values!r}; expected a list of names")
    return tuple(values)


def _describe(shape: dict[str, Any]) -> str:
    return "a {} model with {} layers of width {}".format(*(shape.get(name) for name in SHAPE))
