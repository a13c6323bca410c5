"""Exports and verifications of models whose checkpoints name or hold parameters otherwise agree with a merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import running_hub
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import INDEX, LAYER_1, SHARDS, edit, rewrite_config, save_base, stored
from tiny_models import LLAMA_LIKE, assert_same_tensors, changed, logits, same_bits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
)

from peft_locft import (
    LocFTConfig,
    export_peft,
    export_small,
    export_weights,
    inspect_adapter,
    merge_checkpoint,
)

EXPERTS = LocFTConfig(
    target_parameters=["experts.down_proj", "experts.gate_up_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
)
DOWN = LocFTConfig(target_parameters=["experts.down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
DEFAULT = LocFTConfig(task_type="CAUSAL_LM")
HEAD = LocFTConfig(target_modules=["mlp.dense_4h_to_h", "lm_head"], task_type="CAUSAL_LM")
WITH_BIASES = LocFTConfig(
    target_modules=["mlp.c_proj"], layers_to_transform=[1], train_bias=True, task_type="CAUSAL_LM"
)
SPARSE: dict[str, Any] = LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS: dict[str, Any] = LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = LLAMA_LIKE | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
ERNIE: dict[str, Any] = LLAMA_LIKE | {
    "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
    "moe_num_shared_experts": 1,
}  # fmt: skip
JETMOE: dict[str, Any] = LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
LLAMA4: dict[str, Any] = SPARSE | {"intermediate_size_mlp": 48, "head_dim": 8}


def parameters(*names: str) -> LocFTConfig:
    return LocFTConfig(target_parameters=list(names), layers_to_transform=[1], task_type="CAUSAL_LM")


def modules(*names: str) -> LocFTConfig:
    return LocFTConfig(target_modules=list(names), layers_to_transform=[1], task_type="CAUSAL_LM")


# the configuration, the location, and how many tensors of the checkpoint it changes
FAMILIES: dict[str, tuple[PretrainedConfig, LocFTConfig]] = {
    "mixtral": (MixtralConfig(**SPARSE), EXPERTS),
    "mixtral, one of two": (MixtralConfig(**SPARSE), DOWN),
    "mixtral, default": (MixtralConfig(**SPARSE), DEFAULT),
    "phimoe": (PhimoeConfig(**SPARSE), EXPERTS),
    "olmoe": (OlmoeConfig(**SMALL_EXPERTS), EXPERTS),
    "granitemoe": (GraniteMoeConfig(**SPARSE), DEFAULT),
    "minimax_m2": (MiniMaxM2Config(**SPARSE, head_dim=8, rotary_dim=4), EXPERTS),
    "qwen3_moe": (Qwen3MoeConfig(**SMALL_EXPERTS, moe_intermediate_size=16, head_dim=8), EXPERTS),
    "qwen2_moe": (Qwen2MoeConfig(**SMALL_EXPERTS, moe_intermediate_size=16), EXPERTS),
    "deepseek_v3": (DeepseekV3Config(**DEEPSEEK), EXPERTS),
    "gpt_oss": (GptOssConfig(**SPARSE, head_dim=8), parameters("experts.down_proj", "experts.down_proj_bias")),
    "llama4": (Llama4TextConfig(**LLAMA4), EXPERTS),
    "jetmoe": (JetMoeConfig(**JETMOE), parameters("mlp.input_linear.weight", "mlp.output_linear.weight")),
    # a router, whose bias the checkpoint holds beside it
    "ernie4_5_moe": (Ernie4_5_MoeConfig(**ERNIE), modules("mlp.gate")),
}


def save_from_config(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, model_class: Any = AutoModelForCausalLM
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def assert_exports(
    base: Path, folder: Path, config: LocFTConfig, model_class: Any = AutoModelForCausalLM
) -> dict[str, torch.Tensor]:
    """Assert that whatever reads the base agrees with a merge on disk, and stock PEFT with the adapter."""
    edited = edit(base, folder / "adapter", config, model_class=model_class).eval()
    assert "are the same as in training" in inspect_adapter(folder / "adapter", base).verified[-1]
    merge_checkpoint(base, [folder / "adapter"], folder / "merged")
    export = export_weights(folder / "adapter", folder / "edited.safetensors", base)
    merged = stored(folder / "merged")
    names = changed(merged, stored(base))
    assert names
    assert_same_tensors(load_file(export.path), {name: merged[name] for name in names})
    export_peft(folder / "adapter", folder / "stock", base)
    plain = model_class.from_pretrained(base, dtype="auto").eval()
    stock = PeftModel.from_pretrained(plain, folder / "stock")
    assert same_bits(logits(stock), logits(edited))
    small = export_small(folder / "adapter", folder / "small", base, density=0.5)
    assert 0.5 < small.share_kept < 1
    return {name: merged[name] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_the_checkpoint_holds_one_by_one(family: str, tmp_path: Path) -> None:
    config, location = FAMILIES[family]
    assert_exports(save_from_config(tmp_path / "base", config, torch.bfloat16), tmp_path, location)


def test_experts_that_are_transposed_only_where_the_checkpoint_holds_them_so(tmp_path: Path) -> None:
    """As Qwen3-VL-MoE's: transformers compares the shapes when it loads them."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = SMALL_EXPERTS | {"moe_intermediate_size": 16, "head_dim": 8, "rope_parameters": rope}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
    }
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    base = save_from_config(tmp_path / "base", config, torch.bfloat16, AutoModelForImageTextToText)
    location = LocFTConfig(target_parameters=["language_model.layers.1.mlp.experts.down_proj"])
    assert_exports(base, tmp_path, location, AutoModelForImageTextToText)
    # as published: the other way round
    tensors = {
        name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in stored(base).items()
    }
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="by Transpose, which a merge on disk cannot reverse"):
        merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "transposed")


@pytest.mark.parametrize("names", ["as saved", "of the first release"])
def test_a_model_that_reads_images(names: str, tmp_path: Path) -> None:
    """Its language model has another name in the checkpoint than in the model."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = Qwen2_5_VLConfig(text_config=LLAMA_LIKE | {"rope_parameters": rope}, vision_config=vision)
    base = save_from_config(tmp_path / "base", config, torch.bfloat16, AutoModelForImageTextToText)
    if names == "of the first release":
        tensors = stored(base)
        for file in base.glob("*.safetensors*"):
            file.unlink()
        short = {
            name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
            for name, tensor in tensors.items()
        }
        save_file(short, base / "model.safetensors", {"format": "pt"})
    location = LocFTConfig(target_modules=["model.language_model.layers.1.mlp.down_proj"])
    found = assert_exports(base, tmp_path, location, AutoModelForImageTextToText)
    assert len(found) == 1
    assert names == "as saved" or set(found) == {"model.layers.1.mlp.down_proj.weight"}


def test_a_checkpoint_without_the_prefix(tmp_path: Path) -> None:
    """As GPT-2's on the Hub: it was saved as the model without a head."""
    save_base(tmp_path / "whole", "gpt2")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").transformer
    bare.save_pretrained(tmp_path / "base")
    assert_exports(tmp_path / "base", tmp_path, WITH_BIASES)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_checkpoint_with_a_name_of_its_own_for_the_head(tmp_path: Path) -> None:
    assert_exports(save_base(tmp_path / "base", "gpt_neox"), tmp_path, HEAD)


def test_a_module_of_which_the_checkpoint_lacks_a_tensor_is_not_exported_whole(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2")
    edit(base, tmp_path / "adapter", LocFTConfig(target_modules=["mlp.c_proj"], layers_to_transform=[1]))
    tensors = stored(base)
    del tensors["transformer.h.1.mlp.c_proj.bias"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.1\.mlp\.c_proj\.bias, a tensor of the edited module"):
        export_peft(tmp_path / "adapter", tmp_path / "stock", base)
    export_weights(tmp_path / "adapter", tmp_path / "edited.safetensors", base)
    # of a model that transformers does not know, what the checkpoint holds is all that is known
    rewrite_config(base, model_type="from_elsewhere")
    export_peft(tmp_path / "adapter", tmp_path / "stock", base)


# ---------------------------------------------------------------------- the Hub

READ_FROM_THE_HUB = """
import sys
from peft_locft import export_weights, inspect_adapter

adapter, out = sys.argv[1:]
print(inspect_adapter(adapter, "somebody/model").verified[-1])
export_weights(adapter, out, "somebody/model")
"""


def test_of_a_model_on_the_hub_the_shards_that_are_needed_are_downloaded(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", shard_size=SHARDS)
    edit(base, tmp_path / "adapter", LAYER_1)
    merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "merged")
    with running_hub() as hub:
        hub.repositories["somebody/model"] = {file.name: file.read_bytes() for file in base.iterdir()}
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", READ_FROM_THE_HUB, str(tmp_path / "adapter"), str(tmp_path / "a.safetensors")]
        place = Path(__file__).parents[1]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, cwd=place)
        assert done.returncode == 0, done.stderr
    assert "1 of 1 edited tensors in somebody/model are the same as in training" in done.stdout
    found = load_file(tmp_path / "a.safetensors")
    assert_same_tensors(found, {name: stored(tmp_path / "merged")[name] for name in found})
    index = json.loads((base / INDEX).read_text())["weight_map"]
    assert {file.name for file in (tmp_path / "home").rglob("snapshots/*/*.safetensors")} == {
        index[name] for name in found
    }
    assert len(set(index.values())) > len({index[name] for name in found})
