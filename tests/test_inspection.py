"""What `inspect_adapter` says of a folder. What it refuses is in test_adapter_reading.py."""

from pathlib import Path

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import build
from tiny_training import EDITS, make_trainer

from peft_locft import inspect_adapter


def test_inspecting_says_what_the_folder_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    summary = inspect_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert summary.tensors == {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert summary.num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    text = str(summary)
    assert f"size        {summary.num_bytes / 1e3:.1f} kB" in text
    assert "trained     model.layers.1.mlp.down_proj.locft_delta.weight  F32 32 x 48" in text
    assert "method      LOCFT" in text
    assert "base model  not recorded" in text
    assert f"edits       {len(EDITS)}" in text
    first, *_, last = trainer.epoch_losses
    assert f"loss        {first:.4f} → {last:.4f} in 3 epochs" in text
    assert "learning_rate 0.005" in text
    assert text.endswith(
        "import peft_locft  # registers LOCFT with PEFT\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{tmp_path}")\n'
    )


def test_inspecting_a_depth_first_run_counts_edits(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, edits=EDITS[:3], edit_order="depth_first", per_device_train_batch_size=1)
    trainer.train()
    trainer.save_model()
    assert "in 3 edits" in str(inspect_adapter(tmp_path))


def test_inspecting_lora_needs_no_import_of_ours(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    text = str(inspect_adapter(str(tmp_path)))
    assert "method      LORA" in text
    assert "import peft_locft" not in text and "edits" not in text
    assert text.count("trained ") == 6
