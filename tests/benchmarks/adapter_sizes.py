"""How large an adapter is: published models at their published locations, from their sizes alone.

`python -m tests.benchmarks.adapter_sizes` prints the table of docs/pages/deploy.md.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from peft_locft import LocFTConfig
from peft_locft.io.disk_space import size
from peft_locft.tuner.model import locft_layers

# what the models' own configurations say
MODELS: dict[str, Any] = {
    "Meta-Llama-3-8B-Instruct": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Qwen2.5-7B-Instruct": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Mistral-7B-v0.1": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    ),
    "Qwen2.5-72B-Instruct": Qwen2Config(
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
}
RANKS = (16, 64)


def rows() -> list[list[str]]:
    """Return a row a model: location, sizes of the base, of the delta in 32 and 16 bits, and of LoRA exports."""
    found = []
    for name, config in MODELS.items():
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        num_base = sum(parameter.nbytes for parameter in base.parameters())
        with torch.device("meta"):
            model = get_peft_model(base, LocFTConfig())
        deltas = {
            f"{module}.{kind}": tensor.shape
            for module, layer in locft_layers(model)
            for kind, tensor in layer.scaled_deltas("default").items()
        }
        num_values = sum(shape.numel() for shape in deltas.values())
        # what LoRA has no place for, as the norms of an entire layer, is not exported to it
        linear = all(len(shape) == 2 for shape in deltas.values())
        loras = [size(4 * rank * sum(map(sum, deltas.values()))) if linear else "-" for rank in RANKS]
        location = next(iter(deltas)) if len(deltas) == 1 else f"entire layer, {len(deltas)} tensors"
        found.append([name, location, size(num_base), size(4 * num_values), size(2 * num_values), *loras])
    return found


def main() -> None:
    ranks = " | ".join(f"LoRA, rank {rank}" for rank in RANKS)
    print(f"| model | location | base, bfloat16 | delta, float32 | delta, bfloat16 | {ranks} |")
    print(f"|{' --- |' * (5 + len(RANKS))}")
    for row in rows():
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
