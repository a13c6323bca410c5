"""Exports of an edit for places without `peft_locft`: an adapter for stock PEFT, or the edited weights."""

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
from ..io.files import atomic_file, size
from ..io.parameter_names import ParameterFinder
from ..tuner.config import DELTA_DTYPES
from .claims import MODEL
from .edited_parameters import edited_parameters
from .provenance import ExportDetails, Provenance
from .reading import CheckedAdapter, check_adapter
from .saving import adapter_folder, write_description


@dataclass(frozen=True, slots=True)
class Export:
    """What an export wrote.

    Attributes:
        path: the file or folder.
        tensors: dtype and shape of every edited weight in it, by its name there.
        num_bytes: size of the file with the weights.
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
    """Write an adapter that PEFT and transformers load without `peft_locft`, to the same outputs, bit for bit.

    It holds whole edited weights, as `modules_to_save` of a LoRA adapter without targets. It is as large as they are,
    fits only its own base, and cannot be added to other adapters.

    Args:
        adapter: a local LocFT adapter folder.
        out: the folder to write.
        base: the base model: a folder or a name on the Hub, in safetensors; `None` is the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; `None` is the one that the adapter names with it.
        dtype: dtype in which the base will be loaded: `"float32"`, `"bfloat16"` or `"float16"`; `"auto"` is that of
            the checkpoint.
        force: also use a base with other values than the adapter was trained on.

    Raises:
        ValueError: if the adapter is refused by `check_adapter`, the base by `edited_parameters`, or the adapter holds
            more than deltas or a module inside of another; if the checkpoint lacks a tensor of an edited module.
        NotADirectoryError: if `out` or one above it is a file.
        OSError: if the base cannot be downloaded.

    Example:
        >>> export_peft("out", "out-stock", "Qwen/Qwen2.5-7B-Instruct")
        >>> AutoPeftModelForCausalLM.from_pretrained("out-stock")  # in a process without peft_locft
    """
    checked = deltas_alone(adapter, out)
    checkpoint = Checkpoint(*base_of(checked, base, revision))
    parameters = edited_parameters(checkpoint, [checked], dtype=dtype_of(dtype), force=force)
    tensors = {parameter.name: parameter.edited_parameter() for parameter in parameters}
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    nested = [inner for inner in modules for outer in modules if inner.startswith(f"{outer}.")]
    if nested:
        raise ValueError(
            f"{checked.folder}: {nested[0]} is inside of another edited module, and PEFT saves whole modules, each "
            "once. Merge the adapter and save the model instead."
        )
    tensors |= _beside(checkpoint, tensors, dtype_of(dtype))
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules, **base_fields(checked, base))
    named = {f"{MODEL}{name}": tensor for name, tensor in tensors.items()}
    return write_adapter(checked, out, config, named, ExportDetails("peft"))


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

    They have the bytes that `merge_checkpoint` writes. Servers that load a checkpoint take tensors of these names in
    their calls that update weights.

    Args:
        adapter: a local LocFT adapter folder.
        out: the file to write, `….safetensors`; its folder is made if it is not there.
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
        raise ValueError(f"{path}: expected the name of a file to write, such as edited.safetensors.")
    checked = deltas_alone(adapter, out)
    checkpoint = Checkpoint(*base_of(checked, base, revision))
    parameters = edited_parameters(checkpoint, [checked], dtype=dtype_of(dtype), force=force)
    tensors = {span.name: parameter.edited_tensor(span) for parameter in parameters for span in parameter.base.spans}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    return Export(path, _described(tensors), path.stat().st_size)


def _beside(
    checkpoint: Checkpoint, edited: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return what the edited modules have beside their edited parameters, such as biases; PEFT would miss it."""
    finder = ParameterFinder(checkpoint)
    found = {name: stored for parameter in edited for name, stored in finder.find_beside(parameter).items()}
    tensors = {name: stored.read() for name, stored in found.items() if name not in edited}
    return {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in tensors.items()
    }


def checked_apart(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> CheckedAdapter:
    """Return a checked adapter.

    Raises:
        ValueError: if it is refused, or is in the folder to write.
    """
    checked = check_adapter(adapter)
    if Path(out).resolve() == checked.folder.resolve():
        raise ValueError(f"{out} is the adapter itself and would be overwritten. Give another folder.")
    return checked


def deltas_alone(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> CheckedAdapter:
    """Return a checked adapter that holds only deltas.

    Raises:
        ValueError: if it is refused, holds more, or is in the folder to write.
    """
    checked = checked_apart(adapter, out)
    checked.refuse_all_but_deltas()
    return checked


def base_of(
    adapter: CheckedAdapter, base: str | os.PathLike[str] | None, revision: str | None
) -> tuple[str | os.PathLike[str], str | None]:
    """Return the base model and its revision: the given ones, or those that the adapter names.

    Raises:
        ValueError: if there are neither.
    """
    if base is not None:
        return base, revision
    named = adapter.config.base_model_name_or_path
    if not named:
        raise ValueError(f"{adapter.folder} does not name its base model. Give its folder or name on the Hub.")
    return named, revision or adapter.config.revision


def base_fields(adapter: CheckedAdapter, base: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the fields of an export's configuration that name the base, the adapter's own where it has them."""
    config = adapter.config
    named = config.base_model_name_or_path or (None if base is None else os.fspath(base))
    return {
        "base_model_name_or_path": named,
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
    """Write an adapter folder of another PEFT method, with the LocFT adapter's provenance and `export` in its own."""
    # without the evaluation: an export that answers differently is not what was evaluated
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
    """Return the dtype of that name, or None for `"auto"`, the checkpoint's own.

    Raises:
        ValueError: if it is neither.
    """
    if name not in ("auto", *DELTA_DTYPES):
        raise ValueError(f"dtype={name!r}: expected auto or one of {', '.join(DELTA_DTYPES)}.")
    return None if name == "auto" else getattr(torch, name)
