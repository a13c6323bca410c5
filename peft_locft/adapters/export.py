"""One function for all export forms of an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Literal, get_args

from .exports import Export, export_peft, export_weights
from .lora_export import LoraExport, export_lora
from .small_export import SmallAdapter, export_small

AdapterForm = Literal["peft", "lora", "weights", "small"]
EXPORTS: dict[AdapterForm, Callable[..., Export | LoraExport | SmallAdapter]] = {
    "peft": export_peft,
    "lora": export_lora,
    "weights": export_weights,
    "small": export_small,
}


def export_adapter(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], to: AdapterForm, **options: Any
) -> Export | LoraExport | SmallAdapter:
    """Write a LocFT adapter in another form, and return a summary.

    Args:
        adapter: a local LocFT adapter folder.
        out: the folder to write; with `to="weights"`, the `.safetensors` file.
        to: `"peft"`: an adapter that PEFT loads without `peft_locft`, with equal outputs (`export_peft`). `"lora"`:
            the closest LoRA adapter (`export_lora`). `"weights"`: only the edited weights (`export_weights`).
            `"small"`: a smaller LocFT adapter (`export_small`).
        **options: options of that function, such as `base` and `revision`.

    Raises:
        ValueError: if `to` is unknown, or the form has no such option; and as in the function of the form.
        NotADirectoryError: if `out` or a parent is a file.
        OSError: if the base cannot be loaded, or a file cannot be written.

    Example:
        >>> print(export_adapter("locft-demo", "demo-lora", to="lora", rank=64))
        demo-lora, rank 64, 0.5 MB
        kept 0.7952 of the delta
    """
    if to not in EXPORTS:
        raise ValueError(f"to={to!r}: expected one of {', '.join(get_args(AdapterForm))}.")
    check_options(EXPORTS[to], to, options)
    return EXPORTS[to](adapter, out, **options)


def check_options(export: Callable[..., Any], to: str, options: Iterable[str]) -> None:
    """Raise a ValueError if a form of export lacks one of the options.

    Args:
        export: the function of the form.
        to: name of the form.
        options: names of the options.
    """
    supported = [name for name in signature(export).parameters if name not in ("adapter", "out")]
    unknown = [name for name in options if name not in supported]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: unknown option for to={to!r}; expected {', '.join(supported)}.")
