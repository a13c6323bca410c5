"""Tiny models in GGUF, written as llama.cpp's converter does: for the tests of merging."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from peft_locft.io.checkpoint import Checkpoint


def save_gguf(
    base: Path,
    path: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    max_tensors: int = 0,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint as a GGUF file, its matrices in the type `kind`, and return the (first) file.

    Args:
        base: a folder with one safetensors file.
        path: the file to write.
        kind: type of the matrices; vectors are F32.
        architecture: as GGUF calls it.
        max_tensors: split the file after so many tensors.
        endianess: the byte order.
        kinds: other types, by GGUF name.
    """
    config = Checkpoint(base).config
    heads = config.get("num_attention_heads") or config["n_head"]
    key_heads = config.get("num_key_value_heads") or heads
    layers = config.get("num_hidden_layers") or config["n_layer"]
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess, split_max_tensors=max_tensors)
    writer.add_type("model")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.get("hidden_size") or config["n_embd"])
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * config["n_embd"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count((config.get("hidden_size") or config["n_embd"]) // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"word {number} ünïcode" for number in range(config["vocab_size"])])
    names = gguf.get_tensor_name_map(
        {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], layers
    )
    for name, tensor in load_file(base / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        values = tensor.float()
        if architecture == "llama" and (match := re.search(r"\.([qk])_proj\.(weight|bias)$", name)):
            values = permuted(values, heads if match[1] == "q" else key_heads)
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            values = values.t().contiguous()
        own = (kinds or {}).get(stored, kind if values.dim() > 1 else "F32")
        add(writer, stored, values, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not max_tensors else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Rearrange queries or keys as `LlamaModel.permute` of llama.cpp's converter does."""
    return (
        weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)
    )


def add(writer: Any, name: str, values: torch.Tensor, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, values.numpy().astype(np.float32 if kind == "F32" else np.float16))
    elif kind == "BF16":
        data = values.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=number)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values.numpy(), number), raw_dtype=number)


def stored_values(path: Path) -> dict[str, torch.Tensor]:
    """Return the float32 values of a file's tensors, as the package gguf reads them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32))
    return found


def stored_bytes(path: Path) -> dict[str, bytes]:
    """Return the type and the bytes of a file's tensors."""
    return {
        tensor.name: tensor.tensor_type.name.encode() + tensor.data.tobytes()
        for tensor in gguf.GGUFReader(path).tensors
    }


def metadata(path: Path) -> dict[str, Any]:
    """Return a file's metadata, without the counts of its header."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
