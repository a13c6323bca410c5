"""Merging an edit of one matrix into a large checkpoint: on the disk, through the memory, and `cp` for comparison.

The checkpoint is made here: bfloat16, shapes and names of a Llama, 4 files, random values. Every way runs in a process
of its own, several times in turn; the checkpoint is in the page cache. Memory is the process' peak beyond what it has
after its imports. Only the merges and the detach wait until their files are on the disk; `cp` is shown with that wait
and without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_locft import LocFTConfig, detach, merge_checkpoint, merge_in_place
from peft_locft.tuner import tensor_sha256

from .common import in_own_process, machine, markdown_table, memory_mib, write_json

INDEX = "model.safetensors.index.json"


def main() -> None:
    arguments = parse()
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    print(machine(), flush=True)
    try:
        facts = make_checkpoint(folder, arguments)
        print(
            f"{facts['GB']:.2f} GB in {facts['files']} files; the edited one has {facts['edited GB']:.2f} GB",
            flush=True,
        )
        print(f"one matrix of {facts['tensor MiB']:.0f} MiB is edited", flush=True)
        cells = run(folder, facts, arguments.repeats)
        same = same_bits(folder / "merged", folder / "classic")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    rows = table(cells)
    print(f"\n{markdown_table(rows)}\n\nall tensors have the same bits: {same}")
    write_json(
        arguments.output / "merge.json", {"machine": machine(), "checkpoint": facts, "table": rows, "same": same}
    )
    sys.exit(not same)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("merge_benchmark"), help="made, and removed in the end")
    parser.add_argument("--keep", action="store_true", help="do not remove it")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--intermediate_size", type=int, default=14336)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    return parser.parse_args()


def make_checkpoint(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write a base of random values, and an adapter with a delta of one `down_proj`."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=arguments.hidden_size, intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers, vocab_size=arguments.vocab_size, num_attention_heads=32,
        num_key_value_heads=8, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(base)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    # a little above a quarter: tensors are not cut
    shards = split_torch_state_dict_into_shards(state, max_shard_size=int(num_bytes * 0.26))
    generator = torch.Generator().manual_seed(0)
    block = (0.02 * torch.randn(1 << 20, generator=generator)).bfloat16()
    edited = f"model.layers.{arguments.layers // 2}.mlp.down_proj.weight"
    for file, names in shards.filename_to_tensors.items():
        tensors = {name: fill(state[name].shape, block, generator) for name in names}
        save_file(tensors, base / file, metadata={"format": "pt"})
        if edited in tensors:
            write_adapter(adapter, edited, tensors[edited], base)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (base / INDEX).write_text(json.dumps(index))
    shard = shards.tensor_to_filename[edited]
    return {
        "GB": num_bytes / 1e9,
        "files": len(shards.filename_to_tensors),
        "edited": shard,
        "edited GB": (base / shard).stat().st_size / 1e9,
        "tensor MiB": state[edited].nbytes / (1 << 20),
        "shard size": int(num_bytes * 0.26),
    }


def fill(shape: torch.Size, block: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of one random block again and again, from somewhere in it: drawing all would take minutes."""
    offset = int(torch.randint(len(block), (1,), generator=generator))
    repeats = (shape.numel() + offset) // len(block) + 1
    return block.repeat(repeats)[offset : offset + shape.numel()].reshape(shape).clone()


def write_adapter(adapter: Path, name: str, weight: torch.Tensor, base: Path) -> None:
    module = name.removesuffix(".weight")
    config = LocFTConfig(
        target_modules=[module], task_type="CAUSAL_LM", base_model_name_or_path=str(base), inference_mode=True,
        base_sha256={name: tensor_sha256(weight)},
    )  # fmt: skip
    config.save_pretrained(adapter)
    delta = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    key = f"base_model.model.{module}.locft_delta.weight"
    save_file({key: delta}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------------- the ways


def copy_shard(folder: Path, edited: str, wait: bool) -> None:
    subprocess.run(["cp", folder / "base" / edited, folder / "copied"], check=True)
    if wait:
        with open(folder / "copied", "rb") as file:
            os.fsync(file.fileno())


def merge_linked(folder: Path, **_: Any) -> None:
    merge_checkpoint(folder / "base", [folder / "adapter"], folder / "merged")


def merge_copied(folder: Path, **_: Any) -> None:
    merge_checkpoint(folder / "base", [folder / "adapter"], folder / "copied", link="copy")


def merge_place(folder: Path, **_: Any) -> None:
    merge_in_place(folder / "linked", [folder / "adapter"])


def detach_place(folder: Path, **_: Any) -> None:
    detach(folder / "linked")


def merge_classic(folder: Path, shard_size: int, **_: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "classic", max_shard_size=shard_size)


WAYS: dict[str, Callable[..., None]] = {
    "cp of the edited file": lambda folder, edited, **_: copy_shard(folder, edited, wait=False),
    "the same, on the disk": lambda folder, edited, **_: copy_shard(folder, edited, wait=True),
    "merge_checkpoint, links": merge_linked,
    "merge_checkpoint, copies": merge_copied,
    "merge_in_place": merge_place,
    "detach": detach_place,
    "from_pretrained, merge_and_unload, save_pretrained": merge_classic,
}


def run(folder: Path, facts: dict[str, Any], repeats: int) -> dict[str, list[dict[str, Any]]]:
    cells: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        for way in WAYS:
            # of the last time; what is compared in the end stays
            for name in ("copied", "merged" if "links" in way else "", "classic" if "save" in way else ""):
                remove(folder / name if name else None)
            if way == "merge_in_place":
                remove(folder / "linked")
                shutil.copytree(folder / "base", folder / "linked", copy_function=os.link)
            os.sync()
            print(f"{repeat + 1}/{repeats} {way}", file=sys.stderr, flush=True)
            cell = in_own_process(
                measure, way=way, folder=folder, edited=facts["edited"], shard_size=facts["shard size"]
            )
            cells[way].append(cell)
    return cells


def remove(path: Path | None) -> None:
    if path is not None and path.is_dir():
        shutil.rmtree(path)
    elif path is not None:
        path.unlink(missing_ok=True)


def measure(way: str, folder: Path, **facts: Any) -> dict[str, Any]:
    with contextlib.suppress(OSError):  # the peak of the imports is not that of the way
        Path("/proc/self/clear_refs").write_text("5")
    before, begun = memory_mib()["VmHWM"], time.perf_counter()
    WAYS[way](folder, **facts)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "MiB": memory_mib()["VmHWM"] - before}


def table(cells: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each way; the medians of its runs."""
    first = next(iter(cells))
    copying = median(cell["seconds"] for cell in cells[first])
    rows = []
    for way, found in cells.items():
        seconds = sorted(cell["seconds"] for cell in found)
        rows.append(
            {
                "way": way,
                "seconds": median(seconds),
                "from, to": f"{seconds[0]:.2f}, {seconds[-1]:.2f}",
                "times cp": median(seconds) / copying,
                "peak MiB": None if "cp" in way or "the same" in way else max(cell["MiB"] for cell in found),
            }
        )
    return rows


def same_bits(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit; theirs may be other files."""
    indices = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (one, other)]
    if indices[0].keys() != indices[1].keys():
        return False
    for name in indices[0]:
        tensors = []
        for folder, index in zip((one, other), indices, strict=True):
            with safe_open(folder / index[name], framework="pt") as file:
                tensors.append(file.get_tensor(name))
        if tensors[0].dtype != tensors[1].dtype or not torch.equal(*(tensor.view(torch.int16) for tensor in tensors)):
            return False
    return True


if __name__ == "__main__":
    main()
