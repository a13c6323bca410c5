"""The configuration of the tuner: location, scale and dtype of the delta."""

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

    Without arguments the location is the published one for the model (see `peft_locft.tuner.presets`). The saved
    `adapter_config.json` always contains the full names.

    Args:
        target_modules (`str | list[str]`, *optional*):
            Modules to give a delta: names or name endings; a regular expression that matches the whole name;
            `"all-linear"` (every Linear and Conv1D except the head); or `"entire-layer"` (every weight in the decoder
            layers of `layers_to_transform`). `None`: the published module.
        exclude_modules (`str | list[str]`, *optional*):
            Modules to leave unchanged, matched like `target_modules`.
        layers_to_transform (`int | list[int]`, *optional*):
            Decoder layers to give a delta, counted from 0. `None`: the published layer, or with `target_modules` every
            layer.
        layers_pattern (`str | list[str]`, *optional*):
            Name of the list of decoder layers (`"layers"`, `"h"`), if PEFT does not find it in the module names.
        target_parameters (`list[str]`, *optional*):
            Parameters to give a delta that are not a module's `weight`, such as the fused experts of a
            mixture-of-experts layer (`"experts.down_proj"`).
        modules_to_save (`list[str]`, *optional*):
            Modules to train and save as a whole, as in every PEFT method.
        trainable_token_indices (`list[int] | dict[str, list[int]]`, *optional*):
            Rows of the embedding to train as well, as in `LoraConfig`.
        train_bias (`bool`, defaults to `False`):
            Also give a delta to the bias of every targeted module. It is switched, saved and detached like the other
            deltas. (PEFT's `bias` trains the base model's own bias, which cannot be detached.)
        delta_dtype (`str`, *optional*):
            Dtype in which the delta is trained and saved: `"float32"`, `"bfloat16"` or `"float16"`. `None`: float32,
            or the dtype of the base weight, if it is one of these three and PEFT gets `autocast_adapter_dtype=False`.
        scale (`float`, defaults to `1.0`):
            Strength of the delta: the effective weight is `W + scale * delta`; 0 is the base model.
        init_weights (`bool`, defaults to `True`):
            Start from a delta of zero. `False`: a random delta, for tests.
        base_sha256 (`dict[str, str]`, *optional*):
            Set on saving: sha256 of every base tensor that has a delta, by parameter name. Loading the adapter onto
            other values warns.

    Raises:
        ValueError: if a field has another value than these, `layers_to_transform` or `layers_pattern` is given with a
            regular expression, `layers_pattern` without `layers_to_transform`, or `"entire-layer"` without it.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_locft import LocFTConfig
        >>> model = get_peft_model(model, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[22]))
    """

    # writes the model card of a saved adapter; set at registration, since the tuner knows no other room
    card_writer: ClassVar[Callable[[LocFTConfig, Path], None] | None] = None

    target_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to give a delta: names or name endings, one regular expression, 'all-linear' or "
            "'entire-layer'. Default: the published module for this model."
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules to leave unchanged, matched like target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Decoder layers to give a delta, counted from 0. Default: the published layer."},
    )
    layers_pattern: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the list of decoder layers, such as 'layers' or 'h'."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters to give a delta, if they are no module's weight: 'experts.down_proj'."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save as a whole, beside the deltas."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train as well."}
    )
    train_bias: bool = field(
        default=False, metadata={"help": "Also give a delta to the bias of every targeted module."}
    )
    delta_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of the delta: float32 (the default), bfloat16 or float16."},
    )
    scale: float = field(default=1.0, metadata={"help": "Strength of the delta; 0 = the base model."})
    init_weights: bool = field(
        default=True, metadata={"help": "Start from a delta of zero; False = random, for tests."}
    )
    base_sha256: dict[str, str] | None = field(
        default=None, metadata={"help": "Set on saving: sha256 of every base tensor that has a delta."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOCFT
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
        # the first words of these errors are PEFT's own, which its users match
        for name in ("layers_to_transform", "layers_pattern"):
            if by_pattern and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. LocFTConfig.{name}="
                    f"{getattr(self, name)!r} has no effect with the regular expression target_modules="
                    f"{self.target_modules!r}. Give target_modules as a list of names, or write the layer into "
                    "the expression, as in r'.*\\.layers\\.22\\.mlp\\.down_proj'."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"LocFTConfig.layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform. "
                "Add layers_to_transform=[22], or leave layers_pattern out."
            )
        if self.target_modules == ENTIRE_LAYER and self.layers_to_transform is None:
            raise ValueError("LocFTConfig.target_modules='entire-layer' needs a layer: add layers_to_transform=[23].")
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        if layers is not None and (not layers or not all(type(i) is int and i >= 0 for i in layers)):
            raise ValueError(
                f"LocFTConfig.layers_to_transform={self.layers_to_transform!r}: expected one or more layer numbers, 0 "
                "or above, as in [22]."
            )

    def _check_numbers(self) -> None:
        if self.delta_dtype not in (None, *DELTA_DTYPES):
            raise ValueError(
                f"LocFTConfig.delta_dtype={self.delta_dtype!r}: expected one of {', '.join(DELTA_DTYPES)}."
            )
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float) or not math.isfinite(self.scale):
            raise ValueError(
                f"LocFTConfig.scale={self.scale!r}: expected a finite number (1.0: the delta as trained, 0.0: the "
                "base model)."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the configuration as PEFT does, and let `card_writer` replace PEFT's card template."""
        super().save_pretrained(os.fspath(save_directory), **kwargs)
        # PEFT saves the configuration after its card, so here the card can be replaced
        write_card = type(self).card_writer
        if write_card is not None:
            write_card(self, Path(save_directory))

    # PEFT's hot-swap computes the scaling as lora_alpha / r and reads the patterns. Properties are not saved.

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
