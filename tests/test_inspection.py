"""What `inspect_adapter` says of a folder. What it refuses is in test_reading.py."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build
from tiny_training import EDITS, make_trainer

from peft_locft import LocFTConfig, describe_adapter, inspect_adapter, save_adapter
from peft_locft.adapters.provenance import Provenance
from peft_locft.evaluation.intervals import Estimate
from peft_locft.evaluation.metric_result import MetricResult
from peft_locft.evaluation.report import EvaluationReport
from peft_locft.io.disk_space import size


def test_inspecting_says_what_the_folder_holds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    summary = inspect_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert summary.tensors == {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert summary.num_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    text = str(summary)
    assert f"size           {summary.num_bytes / 1e3:.1f} kB" in text
    sha256 = hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert "verified       all values of 1 tensors are finite\n" in text
    assert f"verified       the weights are unchanged since they were saved, sha256 {sha256[:16]}…\n" in text
    assert "made with      peft-locft 0." in text
    assert "trained        model.layers.1.mlp.down_proj.locft_delta.weight  F32 32 x 48" in text
    assert "method         LOCFT" in text
    assert "base model     not recorded" in text
    assert f"edits          {len(EDITS)}" in text
    first, *_, last = trainer.epoch_losses
    assert f"training loss  {first:.4f} → {last:.4f} in 3 epochs" in text
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
    assert "method         LORA" in text
    assert "import peft_locft" not in text and "edits" not in text
    assert text.count("trained  ") == 6


# ---------------------------------------------------------------------- what the card says too


def test_the_facts_of_the_card_are_printed(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n")
    config = LocFTConfig(scale=0.5, revision="v2")
    results = {
        "reliability_contains": MetricResult("said", Estimate(1, 1, 1), Estimate(0, 0, 0), None, 3),
        "perplexity": MetricResult("of text", Estimate(20.0, 19.0, 21.0), None, None, 3, "windows"),
    }
    report = EvaluationReport(results, {}, [], {"confidence": 0.95})
    model = get_peft_model(build("llama"), config)
    config.base_model_name_or_path = str(tmp_path / "base")
    save_adapter(model, tmp_path / "out", report=report)
    text = str(inspect_adapter(tmp_path / "out"))
    assert f"base model     {tmp_path / 'base'} at v2\n" in text
    assert "licence        own, of the base model\n" in text
    assert "scale          0.5\n" in text
    assert "measured       reliability_contains  0.000 [0.000, 0.000] → 1.000 [1.000, 1.000]\n" in text
    assert "measured       perplexity  20 [19, 21]\n" in text


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (7, "0.0 kB"),
        (6312, "6.3 kB"),
        (140_000, "0.1 MB"),
        (234_881_100, "234.9 MB"),
        (2**31, "2.1 GB"),
    ],
)
def test_sizes_in_words(num_bytes: int, said: str) -> None:
    assert size(num_bytes) == said


# ---------------------------------------------------------------------- what is verified


def make(folder: Path) -> Path:
    build("llama").save_pretrained(folder / "base")
    save_adapter(get_peft_model(build("llama"), LocFTConfig(init_weights=False)), folder / "adapter")
    return folder / "adapter"


def test_weights_that_were_exchanged_are_seen(tmp_path: Path) -> None:
    adapter = make(tmp_path)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors has the sha256 \w{16}…; expected \w{16}…, recorded"
    ):
        inspect_adapter(adapter)
    describe_adapter(adapter)
    assert "the weights are unchanged since they were saved" in str(inspect_adapter(adapter))


def test_an_adapter_without_a_record_is_read_all_the_same(tmp_path: Path) -> None:
    adapter = make(tmp_path)
    (adapter / "locft_provenance.json").unlink()
    summary = inspect_adapter(adapter)
    assert summary.verified == ("all values of 1 tensors are finite",)
    assert summary.provenance == Provenance()


def test_the_base_is_verified_where_it_is_given(tmp_path: Path) -> None:
    adapter = make(tmp_path)
    summary = inspect_adapter(adapter, tmp_path / "base")
    said = f"1 of 1 edited tensors in {tmp_path / 'base'} are the same as in training"
    assert summary.verified[-1] == said
    build("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"weight of \S*/other is not the weight that \S*adapter was trained on"):
        inspect_adapter(adapter, tmp_path / "other")


def test_inspecting_a_locft_adapter_does_not_wait_for_peft(tmp_path: Path) -> None:
    code = (
        "import sys; from peft_locft import inspect_adapter; print(inspect_adapter(sys.argv[1]));"
        "print([name for name in ('peft', 'transformers', 'datasets', 'accelerate') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(make(tmp_path))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout.startswith("method         LOCFT\n") and result.stdout.endswith("\n[]\n")


def test_a_base_cannot_be_verified_without_a_record_of_it(tmp_path: Path) -> None:
    make(tmp_path)
    get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(
        ValueError, match=r"lora does not record which base tensors it was trained on, so \S*base cannot be"
    ):
        inspect_adapter(tmp_path / "lora", tmp_path / "base")


def test_what_another_method_writes_does_not_reach_the_terminal(tmp_path: Path) -> None:
    get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "a\x1b[2Jb", "revision": "\n"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = str(inspect_adapter(tmp_path))
    assert "base model     a?[2Jb at ?\n" in text and "\x1b" not in text


def test_names_may_have_other_spaces_and_settings_of_the_future_any_value(tmp_path: Path) -> None:
    adapter = make(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "利根川\u3000base"}))
    facts = json.loads((adapter / "locft_provenance.json").read_text())
    recipe: dict[str, object] = {
        "learning_rate": 1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "seed": 1,
    }
    recipe |= {"edit_order": "breadth_first", "objective": "target_new", "newer": {"a": ["\x1b"]}}
    run = {"edits": {"count": 1, "sha256": "0" * 64}, "recipe": recipe, "training": {"epoch_losses": []}}
    (adapter / "locft_provenance.json").write_text(json.dumps(facts | run))
    text = str(inspect_adapter(adapter))
    assert "newer {'a': ['\\x1b']}" in text and "\x1b" not in text
