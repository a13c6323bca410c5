"""A tiny random model of every decoder-only family that the installed transformers can build.

Sizes are set by the names of a configuration's fields. What these do not get right stands in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB_SIZE = 300
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 4, 2, 8
WINDOW = 4  # shorter than every text of the sweep
POSITIONS = 256
FIRST_PLACEHOLDER = 280  # ids of images, sounds and the like: no text has them


def _same(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


SIZES: dict[str, Any] = {
    **_same(VOCAB_SIZE, "vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    **_same(HIDDEN, "hidden_size", "n_embd", "d_model", "emb_dim", "embed_dim", "embedding_size"),
    **_same(HIDDEN, "word_embed_proj_dim", "backbone_hidden_size", "input_embedding_size", "output_embedding_size"),
    **_same(HIDDEN, "projection_dim", "out_hidden_size", "projector_hidden_size", "text_hidden_size", "lru_width"),
    **_same(HIDDEN, "attention_hidden_size", "projection_hidden_size", "mamba_d_ssm", "kv_dim", "output_dim"),
    **_same(HIDDEN, "adapter_in_dim", "adapter_input_size", "adapter_out_dim", "codebook_dim"),
    **_same(INNER, "intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "d_inner", "decoder_ffn_dim"),
    **_same(INNER, "ffn_hidden_size", "encoder_ffn_dim", "dense_intermediate_size", "intermediate_size_mlp"),
    **_same(24, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    **_same(24, "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"),
    **_same(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "linear_num_heads"),
    **_same(HEADS, "decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
    **_same(HEADS, "num_decoder_attention_heads", "swa_num_attention_heads", "swa_attention_heads"),
    **_same(KV_HEADS, "num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"),
    **_same(HEAD_DIM, "head_dim", "global_head_dim", "swa_head_dim", "dim_head", "kv_channels", "v_head_dim"),
    **_same(HEAD_DIM, "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "attention_head_size"),
    **_same(HEAD_DIM, "mamba_head_dim", "mamba_d_head", "qk_nope_head_dim", "index_head_dim"),
    **_same(4, "qk_rope_head_dim", "rotary_dim"),
    **_same(16, "kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "router_hidden_size"),
    **_same(2, "linear_num_key_heads", "index_n_heads", "n_mamba_heads", "mamba_n_groups", "n_groups"),
    **_same(2, "mamba_ngroups", "moe_topk", "moe_k", "num_experts_per_tok", "top_k_experts", "topk"),
    **_same(4, "linear_num_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_same(8, "mamba_n_heads", "mamba_num_heads", "state_size", "ssm_state_size", "mamba_d_state"),
    **_same(8, "hidden_size_per_layer_input", "laurel_rank", "loop_gate_rank", "gated_norm_rank", "hc_lowrank"),
    **_same(1, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"),
    **_same(1, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    **_same(0, "num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"),
    **_same(WINDOW, "sliding_window", "sliding_window_size", "window_size", "attention_window_size"),
    **_same(WINDOW, "local_attention", "attention_chunk_size", "keep_window_size", "index_topk"),
    **_same(POSITIONS, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    **_same(POSITIONS, "max_target_positions"),
    **_same(8, "mamba_chunk_size", "chunk_size"),
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
VISION: dict[str, Any] = {
    **_same(16, "image_size"),
    **_same(8, "patch_size"),
    **_same(2, "depth", "num_hidden_layers", "num_layers"),
    **_same(HIDDEN, "hidden_size", "embed_dim", "out_hidden_size", "projection_dim"),
    **_same(HEADS, "num_heads", "num_attention_heads"),
}
LAYERS: tuple[str, ...] = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
)
LAYERS += ("num_decoder_layers", "num_encoder_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}  # twice the hidden size in all

# by the model type of a configuration, or of a part of one
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA2 | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "beam": {"num_hidden_layers": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50, "local_attention_window_len": 8},
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_PLACEHOLDER}},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE}},
    "cosmos3_edge_text": {"rope_parameters": MROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note_text": {
        "head_dim": 12,
        "index_head_dim": 8,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads", "qk_rope_head_dim")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank")},
        **{"swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {1: {"num_local_experts": 4, "num_experts_per_tok": 2}},
    },
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24]},
    "falcon_h1": {"mamba_d_ssm": 64} | MAMBA2,
    "gemma4_assistant": {"vocab_size_per_layer_input": 0},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": MAMBA2 | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hy_v4_vl_text": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 0]}},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_glimmer_text": {"output_multiplier": 1.0},
    "muse_spark_text": {"output_multiplier": 1.0},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    "molmo2_vision": {"image_size": [16, 16]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 298},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 298},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4},
        **{"indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "split_ngram_parts": 1},
        **{"heads_per_ngram": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2},
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
        **{"num_key_value_heads": 4},
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding", "hybrid"]},
}
NEEDS_AN_IMAGE = "needs an image"
# model types that cannot run on text alone, or need what is not installed: building some of them takes a minute
UNUSABLE = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "needs timm"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "needs the states of another model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "predicts sounds, not text"),
    **dict.fromkeys(("florence2", "t5gemma2", "udop"), "an encoder and a decoder"),
    **dict.fromkeys(("blip", "blip-2", "idefics", "instructblip", "instructblipvideo", "kosmos-2"), NEEDS_AN_IMAGE),
    **dict.fromkeys(("pix2struct", "pp_formulanet", "vision-encoder-decoder"), NEEDS_AN_IMAGE),
    "evolla": "no auto class of transformers builds it",
    "pi0": "needs the state of a robot",
}
SIX_LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 3}
LONG_ROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20, "factor": POSITIONS / 20},
    **{"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
# one model type in other configurations
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert (decoder)": ("bert", {"is_decoder": True}),
    "big_bird (decoder)": ("big_bird", {"is_decoder": True, "attention_type": "original_full"}),
    "deepseek_v32 (eager)": ("deepseek_v32", {"attn_implementation": "eager"}),
    "electra (decoder)": ("electra", {"is_decoder": True}),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
    "falcon (sequential)": ("falcon", {"parallel_attn": False, "multi_query": False}),
    "falcon (new architecture)": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2 (eager)": ("gemma2", {"attn_implementation": "eager", "attn_logit_softcapping": 2.0}),
    "gemma3_text (both directions)": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma3n_text (shared keys)": ("gemma3n_text", {"num_hidden_layers": 6, "num_kv_shared_layers": 2, **SIX_LAYERS}),
    "gemma4_text (shared keys)": ("gemma4_text", {"num_hidden_layers": 6, "num_kv_shared_layers": 2, **SIX_LAYERS}),
    "gpt_bigcode (multi-head)": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "llama (eager)": ("llama", {"attn_implementation": "eager"}),
    "llama (multi-query)": ("llama", {"num_key_value_heads": 1}),
    "llama (tied head)": ("llama", {"tie_word_embeddings": True}),
    "mistral (no window)": ("mistral", {"sliding_window": None}),
    "mpt (no ALiBi)": ("mpt", {"attn_config": {"alibi": False}}),
    "opt (projected)": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "phi3 (long rope)": ("phi3", {"original_max_position_embeddings": 20, "rope_parameters": LONG_ROPE}),
    "qwen2 (window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen2 (tied head)": ("qwen2", {"tie_word_embeddings": True}),
    "roberta (decoder)": ("roberta", {"is_decoder": True}),
    "starcoder2 (no window)": ("starcoder2", {"sliding_window": None}),
    "xlm (causal)": ("xlm", {"causal": True}),
    "xlm-roberta-xl (decoder)": ("xlm-roberta-xl", {"is_decoder": True}),
    "xlnet (one direction)": ("xlnet", {"attn_type": "uni"}),
    "xmod (decoder)": ("xmod", {"is_decoder": True}),
}


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """Return a small configuration that has every kind of layer of its family."""
    return _config(CONFIG_MAPPING[model_type], SIZES, overrides)


def _config(kind: type[PretrainedConfig], sizes: dict[str, Any], overrides: dict[str, Any]) -> Any:
    fields = {each.name: each.default for each in dataclasses.fields(kind)}
    values = {name: value for name, value in sizes.items() if name in fields}
    values |= _placeholders(fields)
    values |= {name: 3 for name in LAYERS if name in fields and name not in values}
    for name, spec in getattr(kind, "sub_configs_defaults", {}).items():
        values[name] = _sub_config(name, spec)
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
    if sizes is SIZES and "mrope_section" in getattr(kind, "ignore_keys_at_rope_validation", ()):
        values["rope_parameters"] = MROPE
    values |= OVERRIDES.get(kind.model_type, {})
    if sizes is SIZES:
        values |= {name: kinds for name, kinds in _layer_kinds(kind, values).items() if name not in overrides}
    return kind(**(values | overrides))


def _sub_config(name: str, spec: Any) -> Any:
    model_type = spec.model_type or getattr(spec.config_class, "model_type", None)
    kind = CONFIG_MAPPING[model_type] if "model_type" not in vars(spec.config_class) else spec.config_class
    is_text = not any(word in name for word in ("vision", "visual", "audio", "vq", "vit", "sam", "image"))
    given = {key: value for key, value in (spec.init_kwargs or {}).items() if key not in SIZES | VISION}
    return _config(kind, SIZES if is_text else SIZES | VISION, given)


def _placeholders(fields: dict[str, Any]) -> dict[str, int]:
    """Return an id of its own for each token that stands for an image or the like."""
    names = [name for name in fields if name.endswith(("_token_id", "_token_index", "_start_id", "_end_id"))]
    names = [name for name in names if name not in SIZES and isinstance(fields[name], int)]
    return {name: FIRST_PLACEHOLDER + number % 20 for number, name in enumerate(names)}


def _layer_kinds(kind: type[PretrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Return lists of kinds of layers, and their number, so that each kind that a large model has is there."""
    fields = {each.name for each in dataclasses.fields(kind)}
    counts = [name for name in LAYERS if name in values]
    try:
        large = kind(**(values | dict.fromkeys(counts, 24)))
    except Exception:  # lists in `OVERRIDES` say it all
        return {}
    found = {name: list(dict.fromkeys(getattr(large, name, None) or ())) for name in KINDS}
    found = {name: kinds for name, kinds in found.items() if kinds and name in fields and name not in values}
    if not found or max(map(len, found.values())) == 1:
        return {}
    number = max(4, *map(len, found.values()))
    # attention of two kinds in turn; dense layers first
    lists = {
        name: [kinds[min(i, len(kinds) - 1) if "mlp" in name else i % len(kinds)] for i in range(number)]
        for name, kinds in found.items()
    }
    return lists | dict.fromkeys(counts, number)


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model in evaluation mode, every weight off its initial value; the same one at every call.

    Args:
        family: a model type, or a name in `VARIANTS`.
    """
    if family in UNUSABLE:
        raise ValueError(f"{family}: {UNUSABLE[family]}")
    model_type, overrides = VARIANTS.get(family, (family, {}))
    loading = {name: value for name, value in overrides.items() if name == "attn_implementation"}
    config = tiny_config(model_type, **{name: value for name, value in overrides.items() if name not in loading})
    make = partial(auto_class(family).from_config, config, **loading)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        if dtype == torch.float32:
            return model
        rounded = make(dtype=dtype).eval()  # not `to`: buffers and some weights stay float32 in models that are loaded
    rounded.load_state_dict(model.state_dict())
    return rounded


def auto_class(family: str) -> Any:
    model_type, _ = VARIANTS.get(family, (family, {}))
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if is_causal else AutoModelForImageTextToText


def all_families() -> list[str]:
    """Return every model type with a causal head, and every one that takes images beside text."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
