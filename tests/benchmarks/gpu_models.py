"""Models of the published sizes with random weights, synthetic edits, and what a device has: for `gpu.py`."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.metadata
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from peft_locft import Edit

from .common import memory_mib

# the shapes of Meta-Llama-3-8B-Instruct, Qwen2.5-7B-Instruct and Qwen2.5-72B-Instruct
LLAMA_8B, QWEN_7B, QWEN_72B = "llama-8b", "qwen2.5-7b", "qwen2.5-72b"
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    LLAMA_8B: (
        LlamaConfig,
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_parameters": {"rope_type": "default"}},
    ),
    QWEN_7B: (
        Qwen2Config,
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default"}},
    ),
    QWEN_72B: (
        Qwen2Config,
        {"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "rope_parameters": {"rope_type": "default"}},
    ),
}
# weights as much larger as rows are shorter: logits, and so losses, differ as much as at the published sizes
TOY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def configuration(name: str, toy: bool, num_layers: int | None = None) -> PretrainedConfig:
    """Return a model's configuration: of the published size, or a toy's; with all its layers, or so many."""
    kind, fields = SHAPES[name]
    fields = fields | (TOY if toy else {}) | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    eos = make_tokenizer().eos_token_id
    return kind(
        **fields, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=eos, eos_token_id=eos,
        pad_token_id=eos,
    )  # fmt: skip


def build(config: PretrainedConfig, device: str, attention: str = "sdpa") -> Any:
    """Return a model with random bfloat16 weights, made on the device; the same weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval()


def grow(model: Any, num_layers: int) -> None:
    """Append copies of the last decoder layer, each with weights of its own, up to so many layers.

    A copy takes a fraction of the time of new random numbers on a CPU.
    """
    layers, config = model.model.layers, model.config
    while len(layers) < num_layers:
        # the memo: all layers share one configuration, as in a model that was made whole
        layer = copy.deepcopy(layers[-1], {id(config): config})
        layer.self_attn.layer_idx = len(layers)
        layers.append(layer)
    config.num_hidden_layers = len(layers)
    config.layer_types = ["full_attention"] * len(layers)


def make_tokenizer() -> Any:
    """Return a tokenizer of 500 tokens, trained on the spot; every model here has room for them."""
    from tokenizers_for_tests import make_tokenizer

    return make_tokenizer("llama3")


def synthetic_edits(count: int) -> list[Edit]:
    """Return the same edits for the same count: prompts of 6 to 16 random words, targets of 1 to 4."""
    from tokenizers_for_tests import SENTENCES

    words = sorted(set(" ".join(SENTENCES).replace(",", "").replace(".", "").replace("?", "").split()))
    draw = random.Random(0)
    return [
        Edit(
            prompt=" ".join(draw.choices(words, k=draw.randint(6, 16))),
            target=" ".join(draw.choices(words, k=draw.randint(1, 4))),
        )
        for _ in range(count)
    ]


# ---------------------------------------------------------------------- the device


def the_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for the device: a clock that is read before tells nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_unused() -> None:
    """Give back what nothing refers to, and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where the system forbids it, the peak is the process'
            Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the peak of the tensors on the GPU since `free_unused`; without a GPU, that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return memory_mib()["VmHWM"] / 1024


def describe() -> dict[str, Any]:
    """Return the device and the versions, in words."""
    found: dict[str, Any] = {"device": "no GPU"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        found = {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}",
            "CUDA": str(torch.version.cuda),
        }
    found |= {"Python": platform.python_version(), "torch": torch.__version__}
    found["transformers"] = transformers.__version__
    for name in ("peft", "accelerate", "triton", "flash-attn", "flash-attn-3", "kernels"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def seconds_of(run: Any, repeats: int) -> float:
    """Return the seconds of one call: the mean of so many after one that warms up."""
    run()
    synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - begun) / repeats


def rates(toy: bool) -> dict[str, float]:
    """Return the rate of bfloat16 products, and of copies to the device and back as `module.to` makes them."""
    device, size = the_device(), 256 if toy else 8192
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    found = {"bfloat16, TFLOP/s": 2e-12 * size**3 / seconds_of(lambda: one @ other, 10)}
    on_cpu = one.cpu()
    num_gb = one.nbytes / 1e9
    # a copy to where it is would be none
    found["CPU to device, GB/s"] = num_gb / seconds_of(lambda: on_cpu.to(device, copy=True), 3)
    found["device to CPU, GB/s"] = num_gb / seconds_of(lambda: one.to("cpu", copy=True), 3)
    return found


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
