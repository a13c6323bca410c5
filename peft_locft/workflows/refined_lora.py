"""A small LoRA adapter that keeps the edits: the truncated delta, then a few epochs towards edits and full delta."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from ..adapters.edited_parameters import deltas_of, terms_of
from ..adapters.exports import base_of, check_delta_source, write_adapter
from ..adapters.lora_export import export_lora
from ..adapters.provenance import ExportDetails
from ..adapters.reading import CheckedAdapter
from ..adapters.shipped_edits import adapter_edits
from ..data.chat import written_form
from ..data.edits import EditSource, read_edits
from ..engine.loading import load_model
from ..engine.model_state import as_base
from ..io.arithmetic import compose_weight
from ..io.disk_space import size
from ..io.parameter_names import clean_name
from ..training.config import BreadthFirstConfig
from ..training.learned import LearnedEdits
from ..training.trainer import BreadthFirstTrainer

RELATIVE_RATE = 0.1  # of the root mean square of the factors, which are scaled to have the same one
NUM_EPOCHS = 30
# prompts about other subjects, held to the full delta's distributions
RETAINED: dict[str, Any] = {
    "retained_subjects": 4,
    "retained_per_edit": 1.0,
    "retained_loss": "kl",
    "stop_at_learned": 0.99,
    "lr_scheduler_type": "linear",
}


@dataclass(frozen=True, slots=True)
class RefinedLora:
    """Summary of a refined LoRA export.

    Attributes:
        path: the folder.
        rank: rank of every module's matrices.
        truncated: which edits the truncated delta answered, before it was refined.
        learned: which edits the refined adapter answers.
        num_epochs: epochs of the refinement; 0 if the truncated delta answered enough.
        num_bytes: size of the weights file.
    """

    path: Path
    rank: int
    truncated: LearnedEdits
    learned: LearnedEdits
    num_epochs: int
    num_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path}, rank {self.rank}, {size(self.num_bytes)}\n"
            f"truncated: {self.truncated.num_learned} of {self.truncated.num_edits} edits\n"
            f"refined for {self.num_epochs} epochs: {self.learned}"
        )


def export_refined_lora(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    rank: int = 16,
    edits: EditSource | None = None,
    num_train_epochs: int = NUM_EPOCHS,
    relative_learning_rate: float = RELATIVE_RATE,
    revision: str | None = None,
    dtype: str = "auto",
    progress: bool = True,
) -> RefinedLora:
    """Write a LoRA adapter of a small rank that answers the edits.

    A truncated delta (`export_lora`) of a small rank loses edits. Here it is where training starts: the LoRA matrices
    are trained breadth-first on the edits, and towards the full delta's distributions on prompts about other subjects.

    Args:
        adapter: a local LocFT adapter folder; its location must be linear modules.
        out: the folder to write.
        base: as in `export_lora`. It is loaded.
        rank: rank of every module's matrices, up to 512.
        edits: the edits that the adapter was trained on; `None`: those that it ships.
        num_train_epochs: at most so many; training ends when the adapter answers 99 % of the edits.
        relative_learning_rate: relative to the root mean square of the matrices.
        revision: as in `export_lora`.
        dtype: precision of the base in training; `"auto"`: that of its checkpoint.
        progress: show progress bars.

    Raises:
        ValueError: as in `export_lora`; also if the adapter ships no edits and none are given.
        NotADirectoryError: if `out` or a parent is a file.
        OSError: if the base cannot be loaded, or a file cannot be written.

    Example:
        >>> from peft_locft.workflows import export_refined_lora
        >>> print(export_refined_lora("out", "out-lora", rank=16))
    """
    checked = check_delta_source(adapter, out)
    trained = adapter_edits(adapter) if edits is None else read_edits(edits)
    source, commit = base_of(checked, base, revision)
    model, tokenizer = load_model(source, dtype, revision=commit)
    with TemporaryDirectory() as folder:
        export_lora(adapter, folder, base, rank=rank, revision=revision)
        config = LoraConfig.from_pretrained(folder)
        lora = PeftModel.from_pretrained(model, folder, is_trainable=True)
        args = _recipe(checked, num_train_epochs, relative_learning_rate * _balance(lora), folder, progress)
        trainer = RefiningTrainer(
            model=lora,
            args=args,
            train_dataset=trained,
            processing_class=tokenizer,
            edited=edited_weights(lora, checked),
        )
        truncated = trainer.measure_learned()
        assert truncated is not None
        if not truncated.is_enough:
            trainer.train()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in get_peft_model_state_dict(lora).items()}
    written = write_adapter(checked, out, config, tensors, ExportDetails("lora", rank, _share_kept(lora, checked)))
    learned = trainer.learned or truncated
    return RefinedLora(Path(out), rank, truncated, learned, len(trainer.epoch_losses), written.num_bytes)


class RefiningTrainer(BreadthFirstTrainer):
    """A `BreadthFirstTrainer` of LoRA whose retained prompts are held to another edited model.

    Args:
        edited: the weights of that model where they differ from the base, by their names in the model.
    """

    def __init__(self, *, edited: Mapping[str, torch.Tensor], **kwargs: Any) -> None:
        self.edited = edited
        super().__init__(**kwargs)

    def as_reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a model answers as the full delta does."""
        return _with_weights(model, self.edited)


@contextmanager
def _with_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Disable a model's adapter and replace some weights for a while."""
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    before = {name: parameters[name].data for name in weights}
    with as_base(model):
        try:
            for name, weight in weights.items():
                parameters[name].data = weight.to(parameters[name].data)
            yield
        finally:
            for name, data in before.items():
                parameters[name].data = data


def edited_weights(model: nn.Module, adapter: CheckedAdapter) -> dict[str, torch.Tensor]:
    """Return the weights that a LocFT adapter edits, edited, by their names in the model."""
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    edited = {}
    for term in terms_of([adapter]):
        weight = parameters[term.name].data
        deltas = [(delta.reshape(weight.shape), scale) for delta, scale in deltas_of([term], 0, weight.numel())]
        edited[term.name] = compose_weight(weight, deltas)
    return edited


@torch.no_grad()
def _balance(model: PeftModel) -> float:
    """Scale the matrices of each module to one root mean square, and return the smallest one of all modules.

    Their product stays the same. Adam moves each value by about the rate, so matrices of other sizes need other rates.
    """
    sizes = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
            one, other = (float(weight.square().mean().sqrt()) for weight in (first, second))
            if one and other:
                first *= (other / one) ** 0.5
                second *= (one / other) ** 0.5
                sizes.append((one * other) ** 0.5)
    return min(sizes, default=0.0)


def _recipe(adapter: CheckedAdapter, num_epochs: int, rate: float, folder: str, progress: bool) -> BreadthFirstConfig:
    run = adapter.provenance.run
    form = {} if run is None else written_form(run)._asdict() | {"append_eos": run.recipe.get("append_eos", True)}
    return BreadthFirstConfig(
        output_dir=str(Path(folder) / "training"),
        num_train_epochs=num_epochs,
        learning_rate=rate or 1e-4,  # an empty delta
        save_strategy="no",
        report_to=[],
        disable_tqdm=not progress,
        **RETAINED,
        **form,
    )


@torch.no_grad()
def _share_kept(model: PeftModel, adapter: CheckedAdapter) -> float:
    lost = total = 0.0
    modules = {clean_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for term in terms_of([adapter]):
        delta = sum(scale * values.double() for values, scale in deltas_of([term], 0, term.delta.num_values))
        assert isinstance(delta, torch.Tensor)
        product = modules[term.name.rpartition(".")[0]].get_delta_weight("default").double().cpu()
        lost += float((delta.reshape(term.delta.shape) - product).square().sum())
        total += float(delta.square().sum())
    return 1 - lost / total if total else 1.0
