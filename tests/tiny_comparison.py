"""A tiny base and adapters on the disk, for the tests of `locft try`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, save_adapter
from peft_locft.adapters import describe_adapter

FACTS, OTHERS = EDITS[:3], EDITS[5:7]


def save_base(folder: Path, **arguments: Any) -> Path:
    """Save a tiny base that learns edits by heart, with a tokenizer that has a chat template."""
    base_model(sharp=True, **arguments).save_pretrained(folder)
    make_tokenizer("llama2", chat_template="llama2").save_pretrained(folder)
    return folder


def save_learned(
    folder: Path,
    base: Path,
    edits: list[Edit],
    *,
    ship_edits: bool = False,
    chat_template: bool = False,
    **arguments: Any,
) -> Path:
    """Train an adapter that has learned some edits."""
    model = peft_model(sharp=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    tokenizer = make_tokenizer("llama2", chat_template="llama2")
    recipe = {"num_train_epochs": 30, "learning_rate": 0.02, "chat_template": chat_template} | arguments
    trainer = make_trainer(folder, model, edits, tokenizer=tokenizer, **recipe)
    trainer.train()
    trainer.save_model()
    if ship_edits:
        describe_adapter(folder, edits=edits)
    return folder


def save_lora(folder: Path, base: Path) -> Path:
    """Save an untrained adapter of another method."""
    from peft import LoraConfig

    model = peft_model(config=LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"), sharp=True)
    model.peft_config["default"].base_model_name_or_path = str(base)
    save_adapter(model, folder)
    return folder
