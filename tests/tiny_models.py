"""Tiny random models of every family that the laws are tested on, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 100
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
} | TOKENS


def _gemma3(**overrides: Any) -> PretrainedConfig:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    # a vocabulary that dwarfs the layers, as in the real ones; a window shorter than the prompt
    special = {"vocab_size": 4096, "head_dim": 8, "sliding_window": 4, "layer_types": layer_types}
    return Gemma3TextConfig(**(LLAMA_LIKE | special | overrides))


def _gpt2(**overrides: Any) -> PretrainedConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return GPT2Config(**(sizes | TOKENS | overrides))


def _gpt_neox(**overrides: Any) -> PretrainedConfig:
    own = {name: value for name, value in LLAMA_LIKE.items() if name != "num_key_value_heads"}
    return GPTNeoXConfig(**(own | {"use_parallel_residual": True} | overrides))


def _opt(**overrides: Any) -> PretrainedConfig:
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return OPTConfig(**(sizes | TOKENS | overrides))


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": lambda **overrides: LlamaConfig(**(LLAMA_LIKE | overrides)),
    "mistral": lambda **overrides: MistralConfig(**(LLAMA_LIKE | {"sliding_window": 4} | overrides)),
    "mixtral": lambda **overrides: MixtralConfig(**(LLAMA_LIKE | {"num_local_experts": 4} | overrides)),
    "opt": _opt,
    "qwen2": lambda **overrides: Qwen2Config(**(LLAMA_LIKE | overrides)),
    "qwen3": lambda **overrides: Qwen3Config(**(LLAMA_LIKE | {"head_dim": 8} | overrides)),
}
TIED_FAMILIES = ("gemma3", "gpt2", "opt")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Return a random model in evaluation mode: the same one for the same arguments, of any `dtype`.

    Every weight is moved off its initial value: norms of one and biases of zero would hide mistakes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**overrides), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def token_ids(batch_size: int = 2, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits without gradients."""
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def randomize(model: nn.Module, adapter_name: str = "default", seed: int = 0, std: float = 0.1) -> None:
    """Fill all deltas of one adapter with random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        parameter for name, parameter in sorted(model.named_parameters()) if f".locft_delta.{adapter_name}." in name
    ]
    assert parameters, f"there is no adapter {adapter_name}"
    for parameter in parameters:
        parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator))


def base_name(name: str) -> str:
    """Return the name in the base model of something that PEFT has wrapped."""
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every tensor of the base model, by its name there, whatever has been wrapped around it."""
    return {
        base_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items() if "locft_" not in name
    }


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert the same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    assert changed(found, expected) == set()


def changed(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """Return the names of the tensors of which a bit differs: 0.0 is not -0.0, and NaN is NaN."""
    return {name for name in expected if not same_bits(found[name], expected[name])}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def locations(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[nn.Parameter, float]]:
    """Return each delta of an adapter with its scale, by the name of its base parameter."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "locft_delta") and adapter_name in layer.locft_delta:
            for parameter, delta in layer.locft_delta[adapter_name].named_parameters():
                found[f"{base_name(name)}.{parameter}"] = (delta, layer.scaling[adapter_name])
    return found


def save_and_reload(model: PeftModel, base: nn.Module, folder: Any, **kwargs: Any) -> PeftModel:
    """Save the default adapter and load it onto another copy of the base."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base, folder, **kwargs)
