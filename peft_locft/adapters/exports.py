"""Exports an edit for use without `peft_locft`: as an adapter for stock PEFT, or as the edited weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file

from ..io.checkpoint import Checkpoint
from ..io.disk_space import size
from ..io.files import atomic_file
from ..io.parameter_names import ParameterFinder
from ..tuner.config import DELTA_DTYPES
from .claims import MODEL
from .edited_parameters import edited_parameters
from .provenance import ExportDetails, Provenance
from .reading import CheckedAdapter, check_adapter
from .saving import adapter_folder, write_description


@dataclass(frozen=True, slots=True)
class Export:
    """Summary of an export.

    Attributes:
        path: the file or folder.
        tensors: dtype and shape of every tensor in the weights file, by name.
        num_bytes: size of the weights file.
    """

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int

    def __str__(self) -> str:
        rows = [f"{name}  {dtype} {' x '.join(map(str, shape))}" for name, (dtype, shape) in self.tensors.items()]
        return "\n".join([f"{self.path}, {size(self.num_bytes)}", *rows])


def export_peft(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    force: bool = False,
) -> Export:
    """Write an adapter that PEFT and transformers load without `peft_locft`; its outputs are equal bit for bit.

    It holds the whole edited weights, as `modules_to_save` of a LoRA adapter without targets. It is as large as these
    weights, fits only its own base, and cannot be added to other adapters.

    Args:
        adapter: a local LocFT adapter folder.
        out: the folder to write.
        base: the base model in safetensors: a folder or a name on the Hub; `None`: the base named by the adapter.
        revision: branch, tag or commit of the base on the Hub; `None`: the adapter's, if `base` is `None` too.
        dtype: dtype in which the base will be loaded: `"float32"`, `"bfloat16"` or `"float16"`; `"auto"`: the
            dtype of the checkpoint.
        force: accept a base with other values than in training.

    Raises:
        ValueError: if `check_adapter` refuses the adapter, or `edited_parameters` the base; if the adapter holds more
            than deltas; if an edited module is inside another; if the checkpoint lacks a tensor of an edited module.
        NotADirectoryError: if `out` or a parent is a file.
        OSError: if the base cannot be downloaded.

    Example:
        >>> export_peft("out", "out-stock", "Qwen/Qwen2.5-7B-Instruct")
        >>> AutoPeftModelForCausalLM.from_pretrained("out-stock")  # in a process without peft_locft
    """
    checked = check_delta_source(adapter, out)
    checkpoint = Checkpoint(*base_of(checked, base, revision))
    parameters = edited_parameters(checkpoint, [checked], dtype=dtype_of(dtype), force=force)
    tensors = {parameter.name: parameter.edited_parameter() for parameter in parameters}
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    nested = [inner for inner in modules for outer in modules if inner.startswith(f"{outer}.")]
    if nested:
        raise ValueError(
            f"{checked.folder}: {nested[0]} is inside another edited module, but this form saves whole modules. Merge "
            "the adapter and save the model instead."
        )
    tensors |= _other_tensors(checkpoint, tensors, dtype_of(dtype))
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules, **base_fields(checked, base))
    prefixed = {f"{MODEL}{name}": tensor for name, tensor in tensors.items()}
    return write_adapter(checked, out, config, prefixed, ExportDetails("peft"))


def export_weights(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    force: bool = False,
) -> Export:
    """Write only the edited tensors into one safetensors file, under their names in the base's checkpoint.

    Their bytes are equal to those of `merge_checkpoint`. Inference servers accept these names in their weight-update
    calls.

    Args:
        adapter: a local LocFT adapter folder.
        out: the file to write, `….safetensors`; its folder is created if needed.
        base: as in `export_peft`.
        revision: as in `export_peft`.
        dtype: as in `export_peft`.
        force: as in `export_peft`.

    Raises:
        ValueError: as in `export_peft`, and if `out` does not end in `.safetensors`.
        OSError: if the base cannot be downloaded, or the file cannot be written.

    Example:
        >>> export_weights("out", "edited.safetensors", "Qwen/Qwen2.5-7B-Instruct")
    """
    path = Path(out)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"{path}: expected a file name that ends in .safetensors, such as edited.safetensors.")
    checked = check_delta_source(adapter, out)
    checkpoint = Checkpoint(*base_of(checked, base, revision))
    parameters = edited_parameters(checkpoint, [checked], dtype=dtype_of(dtype), force=force)
    tensors = {span.name: parameter.edited_tensor(span) for parameter in parameters for span in parameter.base.spans}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    return Export(path, _described(tensors), path.stat().st_size)


def _other_tensors(
    checkpoint: Checkpoint, edited: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the other tensors of the edited modules, such as biases, which PEFT needs too."""
    finder = ParameterFinder(checkpoint)
    others = {name: stored for parameter in edited for name, stored in finder.find_beside(parameter).items()}
    tensors = {name: stored.read() for name, stored in others.items() if name not in edited}
    return {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def check_export_source(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> CheckedAdapter:
    """Return a checked adapter to export.

    Raises:
        ValueError: if `check_adapter` refuses it, or `out` is its own folder.
    """
    checked = check_adapter(adapter)
    if Path(out).resolve() == checked.folder.resolve():
        raise ValueError(
            f"{out} is the adapter's own folder, which the export would overwrite. Choose another folder."
        )
    return checked


def check_delta_source(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> CheckedAdapter:
    """Return a checked adapter to export that holds only deltas.

    Raises:
        ValueError: as in `check_export_source`, or if it holds more than deltas.
    """
    checked = check_export_source(adapter, out)
    checked.refuse_all_but_deltas()
    return checked


def base_of(
    adapter: CheckedAdapter, base: str | os.PathLike[str] | None, revision: str | None
) -> tuple[str | os.PathLike[str], str | None]:
    """Return the base model and its revision: the given ones, or else those named by the adapter.

    Raises:
        ValueError: if there are none.
    """
    if base is not None:
        return base, revision
    name = adapter.config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter.folder} does not name its base model. Pass base, a folder or a name on the Hub.")
    return name, revision or adapter.config.revision


def base_fields(adapter: CheckedAdapter, base: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the configuration fields of an export that describe the base."""
    config = adapter.config
    name = config.base_model_name_or_path or (None if base is None else os.fspath(base))
    return {
        "base_model_name_or_path": name,
        "revision": config.revision,
        "task_type": config.task_type,
        "inference_mode": True,
    }


def write_adapter(
    adapter: CheckedAdapter,
    out: str | os.PathLike[str],
    config: PeftConfig,
    tensors: dict[str, torch.Tensor],
    export: ExportDetails,
) -> Export:
    """Write an adapter folder of another PEFT method, with the provenance of the LocFT adapter and `export`."""
    # drop the evaluation: it does not hold for an export that answers differently
    provenance = replace(
        Provenance.of_config(config, adapter.provenance.run),
        base_sha256=getattr(adapter.config, "base_sha256", None) or {},
        export=export,
    )
    with adapter_folder(out) as staging:
        save_file(tensors, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        write_description(staging, config, provenance)
    return Export(Path(out), _described(tensors), (Path(out) / SAFETENSORS_WEIGHTS_NAME).stat().st_size)


def _described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}


def dtype_of(name: str) -> torch.dtype | None:
    """Return the dtype of that name; `None` for `"auto"`, the dtype of the checkpoint.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in ("auto", *DELTA_DTYPES):
        raise ValueError(f"dtype={name!r}: expected auto or one of {', '.join(DELTA_DTYPES)}.")
    return None if name == "auto" else getattr(torch, name)
