"""Exports an edit as a LoRA adapter that approximates it, for servers that load only LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, convert_to_lora
from transformers.pytorch_utils import Conv1D

from ..data.chat import written_form
from ..data.edits import Edit, EditSource, read_edits
from ..engine.loading import auto_class_of, load_config, load_model
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import evaluate_edits
from ..evaluation.report import EvaluationReport
from ..io.disk_space import size
from ..tuner.model import locft_layers
from .claims import MODEL
from .exports import base_fields, base_of, check_delta_source, dtype_of, write_adapter
from .provenance import ExportDetails
from .reading import CheckedAdapter
from .saving import describe_adapter

MAX_RANK = 512  # vLLM's largest max_lora_rank


@dataclass(frozen=True, slots=True)
class LoraExport:
    """Summary of a LoRA export.

    Attributes:
        path: the folder.
        rank: rank of every module's matrices.
        share_kept: share of the deltas' squared Frobenius norm that the LoRA adapter keeps, over all modules; 1 = all.
        share_kept_by_module: the same share for each module.
        num_bytes: size of the weights file.
        before: evaluation of the LocFT adapter, if edits were given; its own `before` is the base.
        after: evaluation of the LoRA adapter.
    """

    path: Path
    rank: int
    share_kept: float
    share_kept_by_module: dict[str, float]
    num_bytes: int
    before: EvaluationReport | None = None
    after: EvaluationReport | None = None

    def __str__(self) -> str:
        rows = [
            f"{self.path}, rank {self.rank}, {size(self.num_bytes)}",
            f"kept {self.share_kept:.4f} of the delta",
        ]
        if len(self.share_kept_by_module) > 1:
            rows += [f"  {share:.4f} of {name}" for name, share in self.share_kept_by_module.items()]
        if self.before is not None and self.after is not None:
            for name, result in self.after.results.items():
                if name in self.before.results:
                    rows.append(f"{name}: {self.before.results[name].after} as trained, {result.after} as LoRA")
        return "\n".join(rows)


def export_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    revision: str | None = None,
    edits: EditSource | None = None,
    dtype: str = "auto",
) -> LoraExport:
    """Write the closest LoRA adapter to an edit, and return how much of the delta it keeps.

    PEFT's `convert_to_lora` computes a truncated singular value decomposition. All modules have the same rank, and
    `lora_alpha` equals it, as vLLM and SGLang need. Only the base's configuration is read, unless `edits` are given.

    Args:
        adapter: a local LocFT adapter folder; its location must be linear modules.
        out: the folder to write.
        base: the base model: a folder or a name on the Hub; `None`: the base named by the adapter.
        rank: rank of every module's matrices, up to 512.
        energy: instead of `rank`: use the smallest rank that keeps this share of every module's delta, in (0, 1].
        revision: branch, tag or commit of the base on the Hub; `None`: the adapter's, if `base` is `None` too.
        edits: anything `read_edits` reads: evaluate both adapters on these edits. This loads the base.
        dtype: dtype of the base for the evaluation; `"auto"`: the dtype of its checkpoint.

    Raises:
        ValueError: if not exactly one of `rank` and `energy` is given, or it is out of range; if `check_adapter`
            refuses the adapter; if a delta is not of the weight of a linear module.
        NotADirectoryError: if `out` or a parent is a file.
        OSError: if the base cannot be loaded.

    Example:
        >>> print(export_lora("locft-demo", "demo-lora", rank=64))  # of examples/demo.py
        demo-lora, rank 64, 0.5 MB
        kept 0.7952 of the delta
    """
    _check_numbers(rank, energy)
    dtype_of(dtype)
    evaluation_edits = None if edits is None else read_edits(edits)
    checked = check_delta_source(adapter, out)
    source = base_of(checked, base, revision)
    model = _without_base_weights(checked, *source)
    modules = _linear_modules(model, checked)
    if rank is None:
        assert energy is not None
        rank = max(rank_for(module.get_delta_weight("default"), energy) for module in modules.values())
    _check_rank(rank, checked)
    _, tensors = convert_to_lora(model, rank=rank)
    norms = [_lost_and_total(module, tensors, f"{MODEL}{name}") for name, module in modules.items()]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        fan_in_fan_out=any(isinstance(module.get_base_layer(), Conv1D) for module in modules.values()),
        **base_fields(checked, base),
    )
    share = _share(sum(lost for lost, _ in norms), sum(norm for _, norm in norms))
    written = write_adapter(checked, out, config, tensors, ExportDetails("lora", rank, share))
    before, after = (
        (None, None) if evaluation_edits is None else _evaluate(checked, out, source, evaluation_edits, dtype)
    )
    if after is not None:
        describe_adapter(out, report=after)
    return LoraExport(
        Path(out),
        rank,
        share,
        {name: _share(*pair) for name, pair in zip(modules, norms, strict=True)},
        written.num_bytes,
        before,
        after,
    )


def kept_by_rank(delta: torch.Tensor) -> torch.Tensor:
    """Return the share of a matrix's squared Frobenius norm that its best approximation of each rank keeps.

    Args:
        delta: (m, n).

    Returns:
        Shares from rank 1 to min(m, n), in float64; ones if the matrix is zero.
    """
    wide = delta.double()
    # eigenvalues of the smaller Gram matrix are the squared singular values, and cost far less than the SVD
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    return energies / energies[-1] if energies[-1] > 0 else torch.ones_like(energies)


def rank_for(delta: torch.Tensor, energy: float) -> int:
    """Return the smallest rank that keeps this share of a matrix's squared Frobenius norm."""
    return int((kept_by_rank(delta) < energy).sum()) + 1


def _check_numbers(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ValueError(f"rank={rank}, energy={energy}: expected exactly one of the two.")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank={rank}: expected 1 to {MAX_RANK}, the maximum of vLLM.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected the share of the delta to keep, in (0, 1].")


def _check_rank(rank: int, adapter: CheckedAdapter) -> None:
    for parameter, name in adapter.deltas.items():
        shape = adapter.tensors[name].shape
        if rank > min(shape):
            raise ValueError(
                f"rank={rank}: the delta of {parameter} is {' x '.join(map(str, shape))}, so its rank is at most "
                f"{min(shape)}. Use a rank of {min(shape)} or less."
            )
    if rank > MAX_RANK:
        raise ValueError(
            f"energy: found a needed rank of {rank}; expected at most {MAX_RANK}, the maximum of vLLM. Use a lower "
            "energy, or export the edited weights instead, which keep the whole delta."
        )


def _without_base_weights(adapter: CheckedAdapter, base: str | os.PathLike[str], revision: str | None) -> PeftModel:
    """Return the base model on the meta device, without values, and with the adapter and its real deltas."""
    model_config = load_config(base, revision=revision)
    with torch.device("meta"):
        model = auto_class_of(model_config, base).from_config(model_config)
    return PeftModel.from_pretrained(model, adapter.folder)


def _linear_modules(model: PeftModel, adapter: CheckedAdapter) -> dict[str, Any]:
    layers = {name: layer for name, layer in locft_layers(model) if "default" in layer.locft_delta}
    others = [name for name, layer in layers.items() if not layer.supports_lora_conversion("default")]
    if others:
        raise ValueError(
            f"{adapter.folder} has deltas that LoRA cannot represent: {', '.join(others[:3])}"
            f"{' and others' if len(others) > 3 else ''}. Expected only weights of linear modules. Export the "
            "edited weights instead, or merge the adapter and serve the model."
        )
    return layers


def _lost_and_total(module: Any, tensors: Mapping[str, torch.Tensor], name: str) -> tuple[float, float]:
    """Return the squared Frobenius norms of the lost part of a delta, and of the whole delta."""
    delta = module.get_delta_weight("default")
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    product = product.T if isinstance(module.get_base_layer(), Conv1D) else product
    return float((delta - product).double().square().sum()), float(delta.double().square().sum())


def _share(lost: float, norm: float) -> float:
    return 1 - lost / norm if norm else 1.0


def _evaluate(
    adapter: CheckedAdapter,
    lora: str | os.PathLike[str],
    source: tuple[str | os.PathLike[str], str | None],
    edits: Sequence[Edit],
    dtype: str,
) -> tuple[EvaluationReport, EvaluationReport]:
    base, revision = source
    model, tokenizer = load_model(base, dtype, revision=revision)
    run, args = adapter.provenance.run, EvaluationConfig(protocols=["generation"])
    if run is not None:
        args = replace(args, **written_form(run)._asdict())
    edited = PeftModel.from_pretrained(model, adapter.folder)
    before = evaluate_edits(edited, tokenizer, edits, args, progress=False)
    approximated = PeftModel.from_pretrained(edited.unload(), lora)
    return before, evaluate_edits(approximated, tokenizer, edits, args, progress=False)
