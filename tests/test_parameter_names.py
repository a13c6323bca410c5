"""Parameters are found in checkpoints that name or hold them otherwise, and refused where they cannot be edited."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import classic_merge, edit, rewrite_adapter, rewrite_config, save_base, stored
from tiny_models import FAMILIES, LLAMA_LIKE, assert_same_tensors, changed
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    Qwen2VLConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from peft_locft import LocFTConfig, merge_checkpoint
from peft_locft.io.checkpoint import Checkpoint
from peft_locft.io.parameter_names import ParameterFinder

DOWN = "model.layers.1.mlp.down_proj.weight"
EXPERTS = LocFTConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"], layers_to_transform=[1])


def rename(folder: Path, old: str, new: str) -> None:
    """Rename the tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    tensors = {re.sub(old, new, name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def assert_merges(base: Path, tmp_path: Path, config: LocFTConfig, model_class: Any = None) -> set[str]:
    """Assert that a merge gives the bits of one in memory; return the names of the changed tensors."""
    edited = edit(base, tmp_path / "adapter", config, model_class=model_class)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    expected = classic_merge(edited, tmp_path / "classic")
    if expected.keys() == stored(base).keys():
        assert_same_tensors(stored(tmp_path / "out"), expected)
    return changed(stored(tmp_path / "out"), stored(base))


def test_the_base_models_prefix_may_be_missing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    rename(base, r"^transformer\.", "")  # as in OpenAI's own files
    down = LocFTConfig(target_modules=["mlp.c_proj"], layers_to_transform=[1], train_bias=True)
    found = assert_merges(base, tmp_path, down)
    assert found == {"h.1.mlp.c_proj.weight", "h.1.mlp.c_proj.bias"}


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    down = LocFTConfig(target_modules=["layers.1.mlp.down_proj"])
    assert assert_merges(base, tmp_path, down, model_class=AutoModel) == {DOWN}


def test_a_renamed_head(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt_neox")
    head = LocFTConfig(target_modules=r".*lm_head")
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        assert assert_merges(base, tmp_path, head) == {"embed_out.weight"}


def test_experts_that_are_stored_fused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    layer = "model.layers.1.block_sparse_moe.experts"
    fused = torch.stack([tensors.pop(f"{layer}.{expert}.w2.weight") for expert in range(4)])
    save_file(tensors | {"model.layers.1.mlp.experts.down_proj": fused}, base / "model.safetensors", {"format": "pt"})
    down = LocFTConfig(target_parameters=["experts.down_proj"], layers_to_transform=[1])
    assert assert_merges(base, tmp_path, down) == {"model.layers.1.mlp.experts.down_proj"}


VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
SMALL_EXPERTS: dict[str, Any] = LLAMA_LIKE | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
}  # fmt: skip
MULTIMODAL: dict[str, Any] = {
    "llava": lambda: LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**LLAMA_LIKE), image_token_index=5
    ),
    "gemma3": lambda: Gemma3Config(
        vision_config=VISION, text_config=FAMILIES["gemma3"]().to_dict(), mm_tokens_per_image=4
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(vision_config=QWEN_VISION | {"embed_dim": 32}, text_config=LLAMA_LIKE),
}


def save_from_config(folder: Path, config: PretrainedConfig, auto_class: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", sorted(MULTIMODAL))
def test_models_of_text_and_images(family: str, tmp_path: Path) -> None:
    base = save_from_config(tmp_path / "base", MULTIMODAL[family](), AutoModelForImageTextToText)
    down = LocFTConfig(target_modules=r".*language_model.*layers\.1\.mlp\.down_proj")
    found = assert_merges(base, tmp_path, down, model_class=AutoModelForImageTextToText)
    assert len(found) == 1
    assert found.pop().endswith(DOWN.removeprefix("model."))


def test_many_small_experts(tmp_path: Path) -> None:
    base = save_from_config(tmp_path / "base", Qwen3MoeConfig(**SMALL_EXPERTS), AutoModelForCausalLM)
    assert len(assert_merges(base, tmp_path, EXPERTS)) == 3 * 4


# ---------------------------------------------------------------------- refusals


def assert_refused(match: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")


def test_experts_that_may_be_rearranged_are_refused_where_nothing_says_that_they_are_not(tmp_path: Path) -> None:
    config = Qwen3VLMoeConfig(vision_config=QWEN_VISION | {"out_hidden_size": 32}, text_config=SMALL_EXPERTS)
    base = save_from_config(tmp_path / "base", config, AutoModelForImageTextToText)
    # their values and shape are recorded, and say that these are not rearranged
    assert len(assert_merges(base, tmp_path, EXPERTS, model_class=AutoModelForImageTextToText)) == 2
    shutil.rmtree(tmp_path / "out")
    rewrite_adapter(tmp_path / "adapter", base_sha256=None)
    assert_refused(r"is built from .* by Transpose, which a merge on disk cannot reverse. Merge this", base, tmp_path)


def test_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    edit(base, tmp_path / "adapter", EXPERTS)
    rename(base, r"experts\.3\.", "spare.3.")
    assert_refused(r"3 tensors of .* do not stack to the shape \[4, 32, 48\] of .*experts.down_proj", base, tmp_path)


def test_two_tensors_for_one_parameter_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    found = {f"layers.1.{mlp}.LayerNorm.gamma": torch.ones(3) for mlp in ("mlp", "block_sparse_moe")}
    save_file(found, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"LayerNorm.weight is ambiguous in .*: it may be layers.1.\w+.LayerNorm.gamma or layers.1.\w+.Layer",
    ):
        ParameterFinder(Checkpoint(base)).find("layers.1.mlp.LayerNorm.weight", (3,))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantized_tensor_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors[DOWN] = tensors[DOWN].to(dtype)
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert_refused(rf"{DOWN} of .* is quantized \([FI]8.*\).*and quantize the result", base, tmp_path)


def test_a_packed_tensor_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    del tensors[DOWN]
    module = DOWN.removesuffix(".weight")
    packed = {f"{module}.qweight": torch.zeros(3, dtype=torch.int32), f"{module}.scales": torch.ones(3)}
    save_file(tensors | packed, base / "model.safetensors", {"format": "pt"})
    assert_refused(rf"has no tensor {DOWN}, but {module}.qweight, {module}.scales: it is quantized", base, tmp_path)


UNTIED = LocFTConfig(target_modules=["embed_tokens"])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_tied_embedding_and_head_are_refused(tmp_path: Path) -> None:
    untied = save_base(tmp_path / "untied", "gemma3", tie_word_embeddings=False)
    tied = save_base(tmp_path / "tied", "gemma3")
    edit(untied, tmp_path / "adapter", UNTIED)
    assert_refused(r"embed_tokens.weight is tied in .*save_pretrained\(folder\) after AutoModelFor", tied, tmp_path)
    edit(untied, tmp_path / "adapter", LocFTConfig(target_modules=["lm_head"]))
    assert_refused("lm_head.weight is tied in", tied, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_of_an_unknown_model_what_may_be_tied_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, tmp_path / "adapter", UNTIED)
    rewrite_config(base, model_type="from_elsewhere", tie_word_embeddings=True)
    assert_refused("embed_tokens.weight is tied in", base, tmp_path)
    rewrite_config(base, tie_word_embeddings=False)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    edit(save_base(tmp_path / "known"), tmp_path / "adapter")
    rewrite_config(base, tie_word_embeddings=True)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "layer")
    (base / "config.json").unlink()
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "without a configuration")
