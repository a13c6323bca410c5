"""Which location is trained, and at which precision."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.utils import PeftType

DELTA_DTYPES = ("float32", "bfloat16", "float16")
ENTIRE_LAYER = "entire-layer"
ALL_LINEAR = "all-linear"


@dataclass
class LocFTConfig(PeftConfig):
    """Configuration of a [`LocFTModel`]: full-rank deltas at one or more locations of a base model.

    Without arguments the location is the published one for the model at hand (see `peft_locft.tuner.presets`); the
    saved `adapter_config.json` always holds the resolved location.

    Args:
        target_modules (`str | list[str]`, *optional*):
            Modules that get a delta: a list of names or name endings, a regular expression that matches the whole
            name, `"all-linear"` (every Linear and Conv1D but the head) or `"entire-layer"` (everything with a weight
            inside the decoder layers of `layers_to_transform`). `None`: the published module for this model.
        exclude_modules (`str | list[str]`, *optional*):
            Modules never to touch, matched as `target_modules` are.
        layers_to_transform (`int | list[int]`, *optional*):
            Decoder layers, counted from 0. `None` with explicit `target_modules`: every layer.
        layers_pattern (`str | list[str]`, *optional*):
            Name of the list that holds the decoder layers, where it cannot be told from the names (`"layers"`, `"h"`).
        target_parameters (`list[str]`, *optional*):
            Parameters that are not a module's `weight`, such as the fused experts of a mixture-of-experts layer
            (`"experts.down_proj"`).
        modules_to_save (`list[str]`, *optional*):
            Modules trained and saved whole, as in every PEFT method.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Rows of the embedding that are trained too, as in `LoraConfig`.
        train_bias (`bool`, defaults to `False`):
            Also give a delta to the bias of every targeted module that has one. It is a delta like the others: it is
            switched, saved and detached with them. (PEFT's `bias` trains the base model's own bias, which cannot be
            detached again.)
        delta_dtype (`str`, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`: the precision in which the delta is trained and saved.
        scale (`float`, defaults to `1.0`):
            Strength of the delta: the effective weight is `W + scale * delta`. 0 is the base model.
        init_weights (`bool`, defaults to `True`):
            Start from a delta of zero. `False` draws it at random, which is of use in tests alone.
        base_sha256 (`dict[str, str]`, *optional*):
            Written on saving: the sha256 of every base tensor that has a delta, by parameter name. Loading the
            adapter onto other values warns.

    Raises:
        ValueError: if a field does not have one of the values named here, or if `layers_to_transform` or
            `layers_pattern` is given with a regular expression, which already says which layers it matches.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_locft import LocFTConfig
        >>> model = get_peft_model(model, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[22]))
    """

    # set by whoever writes model cards; the tuner itself knows none
    card_writer: ClassVar[Callable[[LocFTConfig, Path], None] | None] = None

    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that get a delta: names or name endings, one regular expression, 'all-linear' or "
            "'entire-layer'. Default: the published module for this model."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules never to touch, matched as target_modules are."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Decoder layers that get a delta, counted from 0."}
    )
    layers_pattern: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the list that holds the decoder layers, such as 'layers' or 'h'."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that are not a module's weight, such as 'experts.down_proj'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, beside the deltas."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding that are trained too."}
    )
    train_bias: bool = field(
        default=False, metadata={"help": "Also give a delta to the bias of every targeted module that has one."}
    )
    delta_dtype: str = field(
        default="float32", metadata={"help": "Precision of the delta: float32, bfloat16 or float16."}
    )
    scale: float = field(default=1.0, metadata={"help": "Strength of the delta; 0 is the base model."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start from a delta of zero; False draws it at random, for tests."}
    )
    base_sha256: dict[str, str] | None = field(
        default=None, metadata={"help": "Written on saving: sha256 of every base tensor that has a delta."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOCFT
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if isinstance(self.delta_dtype, torch.dtype):
            self.delta_dtype = str(self.delta_dtype).removeprefix("torch.")
        if isinstance(self.target_modules, str) and self.target_modules.lower() in (ALL_LINEAR, ENTIRE_LAYER):
            self.target_modules = self.target_modules.lower()
        self._check_location()
        self._check_numbers()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as in every PEFT method
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _check_location(self) -> None:
        by_pattern = isinstance(self.target_modules, str) and self.target_modules not in (ALL_LINEAR, ENTIRE_LAYER)
        for name in ("layers_to_transform", "layers_pattern"):
            if by_pattern and getattr(self, name) is not None:
                raise ValueError(
                    f"LocFTConfig.{name}={getattr(self, name)!r} has no effect beside the regular expression "
                    f"target_modules={self.target_modules!r}. Give target_modules as a list of names, or write the "
                    "layer into the expression, as in r'.*\\.layers\\.22\\.mlp\\.down_proj'."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"LocFTConfig.layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform. "
                "Give the layers, as in layers_to_transform=[22], or drop layers_pattern."
            )
        if self.target_modules == ENTIRE_LAYER and self.layers_to_transform is None:
            raise ValueError(
                "LocFTConfig.target_modules='entire-layer' needs to know which: give layers_to_transform=[23]."
            )
        layers = self.layers_to_transform
        if layers is not None and (not layers or not all(type(i) is int and i >= 0 for i in layers)):  # type: ignore[union-attr]
            raise ValueError(
                f"LocFTConfig.layers_to_transform={layers!r}: expected one or more layer numbers from 0 upwards, as "
                "in [22]."
            )

    def _check_numbers(self) -> None:
        if self.delta_dtype not in DELTA_DTYPES:
            raise ValueError(
                f"LocFTConfig.delta_dtype={self.delta_dtype!r}: expected one of {', '.join(DELTA_DTYPES)}."
            )
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(
                f"LocFTConfig.scale={self.scale!r}: expected a finite number; 1.0 is the delta as trained, 0.0 the "
                "base model."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration as PEFT does, and let `card_writer` replace PEFT's empty model card."""
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        # of what writes an adapter in PEFT, this is the one step of ours behind its template
        write_card = type(self).card_writer
        if write_card is not None:
            write_card(self, Path(save_directory))

    # PEFT's hot-swap computes a layer's scaling as lora_alpha / r and looks for per-layer patterns. These properties
    # answer it; being properties, they are not part of what is saved.

    @property
    def r(self) -> int:
        return 1

    @property
    def lora_alpha(self) -> float:
        return self.scale

    @property
    def rank_pattern(self) -> dict[str, int]:
        return {}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        return {}

    @property
    def use_rslora(self) -> bool:
        return False
