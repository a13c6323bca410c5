"""TRL's trainer takes our configuration as it takes LoRA's."""

from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from tiny_models import assert_same_tensors, base_state, logits
from tiny_training import EDITS, base_model, trained
from tokenizers_for_tests import make_tokenizer

from peft_locft import LocFTConfig, inspect_adapter

trl = pytest.importorskip("trl", reason="trl is not installed")


def test_sft_trainer_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    base = base_model()
    before = base_state(base)
    records = [{"prompt": edit.prompt, "completion": " " + edit.target} for edit in EDITS]
    trainer = trl.SFTTrainer(
        model=base,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            num_train_epochs=5,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,  # TRL would autocast
            activation_checkpointing=True,  # TRL's default, by the name that transformers does not warn of
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=make_tokenizer("llama2"),
        peft_config=LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1]),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] - 0.1
    assert list(trained(trainer.model)) == ["base_model.model.model.layers.1.mlp.down_proj.locft_delta.default.weight"]
    assert_same_tensors(base_state(trainer.model), before)

    trainer.save_model()
    assert inspect_adapter(tmp_path).config.peft_type == "LOCFT"
    reloaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(reloaded), logits(trainer.model.eval()))
