"""Exports an adapter as a LoRA adapter in GGUF, which llama.cpp adds to a model of any type while it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.edited_parameters import base_to_compare, deltas_of, terms_of
from ..io.arithmetic import one_thread
from ..io.disk_space import size
from ..io.files import atomic_file
from ..io.gguf_file import gguf_package
from .gguf_plan import TOLERANCE, GGUFEdit, GGUFModel, plan_gguf_edits
from .plan import checked_adapters


@dataclass(frozen=True, slots=True)
class GGUFLora:
    """Summary of a LoRA export for llama.cpp.

    Attributes:
        path: the file.
        ranks: rank of the factors, by the model's name of the tensor.
        num_bytes: size of the file.
    """

    path: Path
    ranks: dict[str, int]
    num_bytes: int

    def __str__(self) -> str:
        rows = [f"{self.path}, {size(self.num_bytes)}: the whole delta"]
        return "\n".join(rows + [f"  rank {rank} for {name}" for name, rank in self.ranks.items()])


def export_gguf_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> GGUFLora:
    """Write an adapter as a LoRA adapter for llama.cpp (`--lora`), without a loss.

    One factor is the delta, the other one the identity, so the rank is that of the smaller side of the matrix. The
    model stays as it is, of any type, and the file is added to its outputs. Both factors are float32: llama.cpp would
    round the inputs of another type.

    Args:
        adapter: a local LocFT adapter folder; its deltas must be of matrices inside the layers, or of the head.
        out: the file to write, which ends in `.gguf`.
        base: the model that llama.cpp will load, a GGUF file: it has the names and the arrangement of the tensors.
        base_model: as in `merge_gguf`.
        tolerance: as in `merge_gguf`.
        force: as in `merge_gguf`.

    Returns:
        A summary.

    Raises:
        ValueError: as in `merge_gguf`; also if a delta is of a vector, of the embeddings or of fused experts.
        OSError: if a file cannot be read or written, or the disk has no room.
        ModuleNotFoundError: if the package `gguf` is not installed.

    Example:
        >>> from peft_locft.merging import export_gguf_lora
        >>> print(export_gguf_lora("out", "edits.gguf", base="model.Q4_K_M.gguf"))
    """
    path = Path(out)
    if path.suffix != ".gguf":
        raise ValueError(f"{out} does not end in .gguf: expected the name of a new file.")
    model = GGUFModel(Path(base).absolute())
    checked = checked_adapters(adapter, None)
    with one_thread():
        edits = plan_gguf_edits(model, list(terms_of(checked)), base_to_compare(base_model, checked), tolerance, force)
        for name, edit in edits.items():
            if len(edit.tensor.shape) != 2 or name == "token_embd.weight":
                raise ValueError(
                    f"{name} is no matrix that multiplies its input, and LoRA cannot change it. Merge the adapter "
                    "into the file instead: `locft merge MODEL.gguf ADAPTER OUT.gguf`."
                )
        factors = {name: lora_factors(edit) for name, edit in edits.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staged:
        _write(staged, model, factors)
    ranks = {name: len(lora_a) for name, (lora_a, _) in factors.items()}
    return GGUFLora(path, ranks, path.stat().st_size)


def lora_factors(edit: GGUFEdit) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices whose product is the whole delta of a tensor, as the file arranges it.

    Returns:
        `lora_a`, (r, in), and `lora_b`, (out, r); `lora_b @ lora_a` is the delta. One of them is the identity.
    """
    shape = edit.terms[0].delta.shape
    deltas = deltas_of(edit.terms, 0, edit.terms[0].delta.num_values)
    delta = sum(scale * values.float().reshape(shape) for values, scale in deltas)
    assert isinstance(delta, torch.Tensor)
    delta = edit.layout.to_file(delta).contiguous()
    if delta.shape[0] <= delta.shape[1]:
        return delta, torch.eye(len(delta))
    return torch.eye(delta.shape[1]), delta


def _write(path: Path, model: GGUFModel, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    writer: Any = gguf_package().GGUFWriter(path, model.first.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp multiplies by alpha / rank, and takes 1 where alpha is 0. So factors of several ranks have one alpha
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, (lora_a, lora_b) in factors.items():
        writer.add_tensor(f"{name}.lora_a", lora_a.numpy())
        writer.add_tensor(f"{name}.lora_b", lora_b.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
