"""The nearest LoRA adapter: what it keeps, and in which shape it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build, locations, logits, randomize
from tiny_training import EDITS, base_model, make_trainer
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, export_lora, save_adapter
from peft_locft.adapters import read_adapter
from peft_locft.adapters.lora_export import kept_by_rank, rank_for
from peft_locft.io.disk_space import size

DOWN = {"target_modules": ["down_proj"], "layers_to_transform": [1]}
MODULE = "model.layers.1.mlp.down_proj"


def make(folder: Path, family: str = "llama", location: dict[str, Any] = DOWN, **arguments: Any) -> PeftModel:
    """Save a base and an adapter whose singular values fall off, as those of trained deltas do."""
    build(family, **arguments).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM", scale=0.7, **location))
    randomize(model)
    for delta, _ in locations(model).values():
        if delta.ndim == 2:
            delta.data *= torch.linspace(1, 0, delta.shape[0])[:, None] ** 3
    save_adapter(model, folder / "adapter")
    return model


def best(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def share(delta: torch.Tensor, approximation: torch.Tensor) -> float:
    return float(1 - (delta.double() - approximation.double()).square().sum() / delta.double().square().sum())


@pytest.mark.parametrize("rank", [1, 5, 32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_is_the_nearest_of_its_rank_and_says_how_near(family: str, rank: int, tmp_path: Path) -> None:
    location: dict[str, Any] = {"target_modules": ["c_proj"], "layers_to_transform": [1]} if family == "gpt2" else DOWN
    model = make(tmp_path, family, location)
    export = export_lora(tmp_path / "adapter", tmp_path / "out", rank=rank)
    deltas = read_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    lost = total = 0.0
    for parameter, delta in deltas.items():
        module = parameter.removesuffix(".weight")
        found = loaded.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(found, (0.7 * best(delta, rank)).float(), atol=1e-6, rtol=1e-4)
        assert export.share_kept_by_module[module] == pytest.approx(share(0.7 * delta, found), abs=1e-6)
        lost += float((0.7 * delta - found).square().sum())
        total += float((0.7 * delta).square().sum())
    assert export.share_kept == pytest.approx(1 - lost / total, abs=1e-6)
    if rank == 32:
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_it_has_the_shape_that_servers_take(tmp_path: Path) -> None:
    """As vLLM's PEFTHelper and SGLang's LoRA loader read it."""
    make(tmp_path, location={"target_modules": ["down_proj", "q_proj"]})
    export = export_lora(tmp_path / "adapter", tmp_path / "out", rank=8)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 8, 8, "none")
    assert not config["modules_to_save"] and not config["use_dora"] and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["exclude_modules"]
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("mlp.down_proj", "self_attn.q_proj")]
    assert sorted(config["target_modules"]) == sorted(names)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(f"base_model.model.{n}.lora_{m}.weight" for n in names for m in "AB")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {8}
    assert export.num_bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_energy_is_the_smallest_rank_that_keeps_it_everywhere(tmp_path: Path) -> None:
    make(tmp_path, location={"target_modules": ["down_proj", "k_proj"]})
    export = export_lora(tmp_path / "adapter", tmp_path / "out", energy=0.9)
    fewer = export_lora(tmp_path / "adapter", tmp_path / "out", rank=export.rank - 1)
    assert min(export.share_kept_by_module.values()) >= 0.9 > min(fewer.share_kept_by_module.values())


def test_the_base_models_weights_are_not_needed(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copyfile(tmp_path / "base" / "config.json", tmp_path / "elsewhere" / "config.json")
    export = export_lora(tmp_path / "adapter", tmp_path / "out", tmp_path / "elsewhere", rank=4)
    assert str(export).startswith(f"{tmp_path / 'out'}, rank 4, {size(export.num_bytes)}\nkept ")


def test_a_delta_of_zero_is_kept(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_adapter(get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM")), tmp_path / "adapter")
    export = export_lora(tmp_path / "adapter", tmp_path / "out", energy=0.99)
    assert (export.rank, export.share_kept, export.share_kept_by_module) == (1, 1.0, {MODULE: 1.0})


def test_edits_are_asked_before_and_after(tmp_path: Path) -> None:
    base_model(sharp=True).save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LocFTConfig(task_type="CAUSAL_LM"))
    trainer = make_trainer(tmp_path / "adapter", model, num_train_epochs=40, learning_rate=2e-2)
    trainer.train()
    trainer.save_model()
    full = export_lora(tmp_path / "adapter", tmp_path / "full", rank=32, edits=EDITS)
    assert full.before is not None and full.after is not None
    learned = full.before["reliability_exact_match"].after.value
    assert learned > 0.5
    assert full.after["reliability_exact_match"].after == full.before["reliability_exact_match"].after
    small = export_lora(tmp_path / "adapter", tmp_path / "small", rank=1, edits=EDITS)
    assert small.before == full.before and small.after is not None
    assert small.after["reliability_exact_match"].after.value < learned
    assert f"reliability_exact_match: {small.before['reliability_exact_match'].after} as trained, " in str(small)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_shares_by_rank_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = [share(delta, best(delta, rank)) for rank in range(1, min(shape) + 1)]
    assert kept_by_rank(delta).tolist() == pytest.approx(expected, abs=1e-12)
    assert [rank_for(delta, kept) for kept in (1e-9, expected[1] - 1e-9, expected[1] + 1e-9)] == [1, 2, 3]
    assert rank_for(delta, 1.0) == min(shape)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "rank=None, energy=None: expected exactly one of the two"),
        ({"rank": 4, "energy": 0.9}, r"rank=4, energy=0\.9: expected exactly one of the two"),
        ({"rank": 0}, "rank=0: expected 1 to 512, the maximum of vLLM"),
        ({"rank": 513}, "rank=513: expected 1 to 512, the maximum of vLLM"),
        ({"rank": 33}, rf"rank=33: the delta of {MODULE}\.weight is 32 x 48, so its rank is at most 32\. Use a"),
        ({"rank": 4, "dtype": "int8"}, "dtype='int8': expected auto or one of float32, bfloat16, float16"),
        ({"energy": 0.0}, r"energy=0\.0: expected the share of the delta to keep, in \(0, 1\]"),
        ({"energy": 1.1}, r"energy=1\.1: expected the share of the delta to keep, in \(0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_lora(tmp_path / "adapter", tmp_path / "out", **numbers)
    assert not (tmp_path / "out").exists()


def test_energy_beyond_what_servers_take_is_refused(tmp_path: Path) -> None:
    make(tmp_path, hidden_size=520, intermediate_size=530, num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"energy: found a needed rank of 5\d\d; expected at most 512, the maximum of vLLM"
    ):
        export_lora(tmp_path / "adapter", tmp_path / "out", energy=1.0)


@pytest.mark.parametrize(
    ("family", "location", "named"),
    [
        (
            "llama",
            {"target_modules": "entire-layer", "layers_to_transform": [1]},
            r"model\.layers\.1\.input_layernorm",
        ),
        ("llama", {"target_modules": ["embed_tokens"]}, r"model\.embed_tokens\. Expected"),
        (
            "qwen2",
            {"target_modules": ["q_proj", "k_proj"], "train_bias": True},
            r"\S*0\.self_attn\.q_proj, .* and others",
        ),
        (
            "mixtral",
            {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
            r"model\.layers\.1\.mlp\.experts\. Exp",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_lora_cannot_hold_is_named(family: str, location: dict[str, Any], named: str, tmp_path: Path) -> None:
    make(tmp_path, family, location)
    with pytest.raises(ValueError, match=rf"has deltas that LoRA cannot represent: {named}"):
        export_lora(tmp_path / "adapter", tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_edits_that_cannot_be_read_are_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "edits.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"edits\.jsonl"):
        export_lora(tmp_path / "adapter", tmp_path / "out", rank=4, edits=tmp_path / "edits.jsonl")
    assert not (tmp_path / "out").exists()
