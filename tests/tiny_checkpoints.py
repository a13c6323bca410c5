"""Tiny checkpoints on the disk, adapters for them, and what the tests of merging do with both."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import build, randomize
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig, save_adapter

ONE_FILE, SHARDS = "5GB", "40KB"
INDEX = "model.safetensors.index.json"
LAYER_1 = LocFTConfig(layers_to_transform=[1])


def save_base(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_size: str = ONE_FILE,
    **arguments: Any,
) -> Path:
    """Save a tiny model as transformers does, and a file beside it that is none of its."""
    build(family, dtype, **arguments).save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text('{"of": "no use"}')
    return folder


def edit(
    base: Path,
    adapter: Path,
    config: LocFTConfig = LAYER_1,
    seed: int = 0,
    std: float = 0.1,
    model_class: Any = None,
    **loading: Any,
) -> PeftModel:
    """Load a base in its own dtype, give it a random edit, and save that as an adapter."""
    model = (model_class or AutoModelForCausalLM).from_pretrained(base, **({"dtype": "auto"} | loading))
    config = LocFTConfig(**{name: value for name, value in config.to_dict().items() if name in CHOSEN})
    edited = get_peft_model(model, config)
    randomize(edited, seed=seed, std=std)
    save_adapter(edited, adapter)
    return edited


# get_peft_model writes the resolved location into the configuration: it gets one of its own
CHOSEN = (
    "target_modules", "layers_to_transform", "target_parameters", "train_bias", "delta_dtype", "scale",
    "modules_to_save", "trainable_token_indices", "task_type",
)  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint in a folder, by its name there."""
    if (folder / INDEX).exists():
        shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    else:
        shards = {"model.safetensors"}
    return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}


def classic_merge(edited: PeftModel, folder: Path, **merging: Any) -> dict[str, torch.Tensor]:
    """Return what the way through the memory gives."""
    edited.merge_and_unload(**merging).save_pretrained(folder)
    return stored(folder)


def snapshot(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, and the names of all folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_adapter(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hub_cache(cache: Path, repository: str, folder: Path, commit: str = "0123456789abcdef") -> Path:
    """Put a folder into a cache as huggingface_hub lays it out; return the snapshot's folder."""
    place = cache / f"models--{repository.replace('/', '--')}"
    revision = place / "snapshots" / commit
    (place / "blobs").mkdir(parents=True)
    revision.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (revision / file.name).symlink_to(os.path.relpath(blob, revision))
    return revision
