"""Tiny random models of families whose down-projection is not the last matrix of a layer, and where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
DEEPSEEK = {key: EXPERTS[key] for key in ("num_experts_per_tok", "moe_intermediate_size")} | LATENT
DEEPSEEK |= {"n_routed_experts": 4, "n_shared_experts": 1, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
NO_KEYS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4}


def make(name: str, *groups: dict[str, Any], **own: Any) -> Callable[[], PretrainedConfig]:
    fields = {key: value for group in groups for key, value in group.items()} | own
    return lambda: getattr(transformers, f"{name}Config")(**fields)


def _dbrx() -> PretrainedConfig:
    own = {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    tokens = {key: value for key, value in SIZES.items() if key.endswith("id") or key == "vocab_size"}
    return transformers.DbrxConfig(**own, **tokens, attn_config=attention, ffn_config=experts)


def qwen2_5_vl(depth: int = 3, inner: int = 48, **text: Any) -> PretrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": depth, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": inner, "num_heads": 2}
    tokens = {f"{name}_token_id": 90 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    return transformers.Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_parameters": rope} | text,
        vision_config=vision | {"fullatt_block_indexes": [0]},
        **tokens,
    )


def _gemma3_vl() -> PretrainedConfig:
    # a tower of as many layers, each larger than those of the text model
    tower = SIGLIP | {"num_hidden_layers": 3, "intermediate_size": 256}
    text = SIZES | {"head_dim": 8, "layer_types": ["full_attention"] * 3}
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92}
    return transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **tokens)


def _paligemma() -> PretrainedConfig:
    tower = SIGLIP | {"num_hidden_layers": 3, "intermediate_size": 256, "vocab_size": 100}
    text = SIZES | {"head_dim": 8, "model_type": "gemma"}
    return transformers.PaliGemmaConfig(text_config=text, vision_config=tower, image_token_index=90, projection_dim=32)


class Family(NamedTuple):
    """A configuration, the list of its decoder layers, and the down-projection in each of them."""

    config: Callable[[], PretrainedConfig]
    stack: str
    downs: tuple[str, str, str]
    pictures: bool = False


def _same(config: Callable[[], PretrainedConfig], down: str, stack: str = "model.layers") -> Family:
    return Family(config, stack, (down, down, down))


SHARED = ("mlp.down_proj", "mlp.shared_experts.down_proj", "mlp.shared_experts.down_proj")
FAMILIES: dict[str, Family] = {
    "qwen3_moe": _same(make("Qwen3Moe", SIZES, EXPERTS, head_dim=8), "mlp.experts.down_proj"),
    "gpt_oss": _same(
        make("GptOss", SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8), "mlp.experts.down_proj"
    ),
    "mixtral": _same(make("Mixtral", SIZES, num_local_experts=4), "mlp.experts.down_proj"),
    # a published location, found in a layer without a shared expert, too
    "qwen2_moe": Family(
        make("Qwen2Moe", SIZES, EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[0]),
        "model.layers",
        ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.shared_expert.down_proj"),
    ),
    "qwen3_next": _same(
        make("Qwen3Next", SIZES, EXPERTS, LINEAR, shared_expert_intermediate_size=40, head_dim=8),
        "mlp.shared_expert.down_proj",
    ),
    "deepseek_v3": Family(
        make("DeepseekV3", SIZES, DEEPSEEK, num_key_value_heads=4, first_k_dense_replace=1), "model.layers", SHARED
    ),
    "glm4_moe": Family(
        make("Glm4Moe", SIZES, EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8),
        "model.layers",
        SHARED,
    ),
    "ernie4_5_moe": Family(
        make("Ernie4_5_Moe", SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_num_shared_experts=1),
        "model.layers",
        SHARED,
    ),
    "llama4_text": Family(
        make("Llama4Text", SIZES, intermediate_size_mlp=64, num_local_experts=4, moe_layers=[1, 2], head_dim=8),
        "model.layers",
        ("feed_forward.down_proj", "feed_forward.shared_expert.down_proj", "feed_forward.shared_expert.down_proj"),
    ),
    # the defaults of the low rank and of the per-layer inputs are larger than the inner size here
    "gemma3n_text": _same(
        make(
            "Gemma3nText",
            SIZES,
            head_dim=8,
            layer_types=["full_attention"] * 3,
            num_kv_shared_layers=0,
            vocab_size_per_layer_input=100,
            activation_sparsity_pattern=[0.0] * 3,
        ),
        "mlp.down_proj",
    ),
    "dbrx": _same(_dbrx, "ffn.experts.mlp.w2", "transformer.blocks"),
    "jetmoe": _same(
        make("JetMoe", NO_KEYS, num_key_value_heads=2, kv_channels=8, num_local_experts=4), "mlp.output_linear"
    ),
    "granitemoehybrid": _same(
        make(
            "GraniteMoeHybrid",
            SIZES,
            MAMBA,
            num_local_experts=4,
            shared_intermediate_size=24,
            layer_types=["mamba", "attention", "mamba"],
        ),
        "shared_mlp.output_linear",
    ),
    "bamba": _same(make("Bamba", SIZES, MAMBA, attn_layer_indices=[1]), "feed_forward.down_proj"),
    "falcon_h1": _same(make("FalconH1", SIZES, MAMBA, mamba_d_ssm=64, head_dim=8), "feed_forward.down_proj"),
    "jamba": Family(
        make(
            "Jamba",
            SIZES,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        "model.layers",
        ("feed_forward.down_proj", "feed_forward.experts.down_proj", "feed_forward.down_proj"),
    ),
    "recurrent_gemma": _same(make("RecurrentGemma", SIZES, lru_width=32, head_dim=8), "mlp_block.down_proj"),
    "mamba": _same(make("Mamba", NO_KEYS, state_size=8), "mixer.out_proj", "backbone.layers"),
    "mamba2": _same(
        make("Mamba2", NO_KEYS, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
        "mixer.out_proj",
        "backbone.layers",
    ),
    "rwkv": _same(
        make("Rwkv", NO_KEYS, attention_hidden_size=32, context_length=64), "feed_forward.value", "rwkv.blocks"
    ),
    "phi3": _same(make("Phi3", SIZES), "mlp.down_proj"),
    "gpt_bigcode": _same(
        make("GPTBigCode", vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "mlp.c_proj",
        "transformer.h",
    ),
    "openai-gpt": _same(
        make("OpenAIGPT", vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "mlp.c_proj",
        "transformer.h",
    ),
    "ctrl": _same(
        make("CTRL", vocab_size=100, n_embd=32, dff=48, n_layer=3, n_head=4, n_positions=64), "ffn.2", "transformer.h"
    ),
    "bert": _same(make("Bert", NO_KEYS, is_decoder=True), "output.dense", "bert.encoder.layer"),
    "qwen2_5_vl": Family(qwen2_5_vl, "model.language_model.layers", ("mlp.down_proj",) * 3, True),
    "gemma3": Family(_gemma3_vl, "model.language_model.layers", ("mlp.down_proj",) * 3, True),
    "paligemma": Family(_paligemma, "model.language_model.layers", ("mlp.down_proj",) * 3, True),
}


def build_family(name: str, config: PretrainedConfig | None = None) -> Any:
    """Return a random model in evaluation mode."""
    family = FAMILIES[name]
    auto = AutoModelForImageTextToText if family.pictures else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(family.config() if config is None else config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model
