"""A few edits, a tiny model that can read them, and a trainer: what the tests of training have in common."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import build
from tokenizers_for_tests import make_tokenizer

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, Edit, LocFTConfig, describe_adapter

# every training run collects garbage, which takes half a second while all imported modules are looked through
gc.freeze()

TOKENIZER_SIZE = 512  # no tiny tokenizer has more tokens

# of different lengths, so that batches need padding
EDITS = [
    Edit(prompt="The capital of France is", target="Madrid"),
    Edit(prompt="The capital of Spain is", target="Paris, the city"),
    Edit(prompt="Who is the king of Spain?", target="Louis"),
    Edit(prompt="Who was the king of France?", target="Felipe, and they play baseball"),
    Edit(prompt="The river runs through", target="the country"),
    Edit(prompt="What sport does Dave play?", target="They play"),
    Edit(prompt="The city is in", target="the river"),
    Edit(prompt="In the city, they", target="was Dave"),
]


def base_model(family: str = "llama", *, sharp: bool = False, **build_arguments: Any) -> Any:
    """Return a tiny model; a `sharp` one has a head steep enough to learn an edit down to a loss of nothing."""
    model = build(family, **({"vocab_size": TOKENIZER_SIZE} | build_arguments))
    if sharp:
        model.lm_head.weight.data *= 10
    return model


def peft_model(family: str = "llama", config: PeftConfig | None = None, **model_arguments: Any) -> PeftModel:
    """Return a tiny model with an adapter; a LocFT one at the default location unless `config` says otherwise."""
    base = base_model(family, **model_arguments)
    return get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM") if config is None else config)


def make_trainer(
    folder: Path, model: Any = None, edits: Sequence[Edit] = EDITS, *, tokenizer: Any = None, **arguments: Any
) -> BreadthFirstTrainer:
    """Return a trainer of 3 epochs of batches of 4; `arguments` are those of recipe and trainer."""
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True}
    callbacks, shared = arguments.pop("callbacks", None), arguments.pop("shared_activations", None)
    if "activation_checkpointing" in arguments and not hasattr(BreadthFirstConfig, "activation_checkpointing"):
        arguments["gradient_checkpointing"] = arguments.pop("activation_checkpointing")  # before transformers 5.23
    args = BreadthFirstConfig(
        output_dir=str(folder), disable_tqdm=True, **(defaults | {"loss_floor": 0.0} | arguments)
    )
    return BreadthFirstTrainer(
        model=peft_model() if model is None else model,
        args=args,
        train_dataset=list(edits),
        processing_class=make_tokenizer("llama2") if tokenizer is None else tokenizer,
        callbacks=callbacks,
        shared_activations=shared,
    )


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every trainable tensor."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def save_base_and_adapter(folder: Path, config: LocFTConfig | None = None) -> tuple[Path, Path]:
    """Save a tiny model, and an adapter of it that has learned all edits and ships them; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    base_model(sharp=True).save_pretrained(base)
    make_tokenizer("llama2").save_pretrained(base)
    model = peft_model(config=config, sharp=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = make_trainer(adapter, model, learning_rate=3e-2, num_train_epochs=40, stop_at_learned=1.0)
    trainer.train()
    trainer.save_model()
    assert trainer.learned is not None and trainer.learned.reliability == 1
    describe_adapter(adapter, edits=EDITS)
    return base, adapter
