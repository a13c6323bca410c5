"""Epochs of SmolLM2-135M side by side: the published loop written plainly, and BreadthFirstTrainer.

One location, `model.layers.L.mlp.down_proj`, the same edits in the same batches. Every run has a process of its own,
so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from peft_locft import encode_edits, read_edits
from peft_locft.data.encoding import EncodedEdit, EncodedEdits
from peft_locft.training.batches import EditBatches

from .common import (
    figure,
    in_own_process,
    load,
    machine,
    markdown_table,
    memory_mib,
    parser_for,
    settled,
    shown,
    train,
    write_json,
)

LOSS_FLOOR = 1e-2
SEED = 42  # transformers' own default
VARIANTS = ("plain", "ours")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    rates = matrix_gflops()
    lines = [machine(), f"float32 matrices: {', '.join(f'{name} {rate:.0f} GFLOP/s' for name, rate in rates.items())}"]
    print("\n".join(lines), flush=True)
    cells, rows = [], []
    for layer, dtype in product(arguments.layers, arguments.dtypes):
        pair = {variant: run_cell(variant, layer, dtype, arguments) for variant in VARIANTS}
        cells += list(pair.values())
        rows.append(compared(pair["plain"], pair["ours"], layer, dtype))
    floors = [against_floor(cell, max(rates.values())) for cell in cells if "tail_gflop" in cell]
    print("\n" + markdown_table(rows))
    if floors:
        print(f"\nBreadthFirstTrainer in float32 against its arithmetic:\n\n{markdown_table(floors)}")
    content = {"machine": lines[0], "matrix_gflops": rates, "table": rows, "floor": floors, "cells": cells}
    write_json(arguments.output / "speed.json", content)
    draw(arguments.output / "speed.png", rows)
    sys.exit(any("error" in cell for cell in cells))


def parse() -> argparse.Namespace:
    parser = parser_for(__doc__, epochs=5, num_edits=150)
    parser.add_argument("--batch_size", type=int, help="edits in a batch; None: all of them")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 20, 27], help="edited layers, of 30, from 0")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    return parser.parse_args()


def run_cell(variant: str, layer: int, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one variant at one layer in a process of its own."""
    names = ("edits", "num_edits", "epochs", "learning_rate", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"layer": layer, "dtype": dtype, "batch_size": arguments.batch_size or arguments.num_edits}
    print(f"running {variant}, layer {layer}, {dtype}", file=sys.stderr, flush=True)
    cell = in_own_process(measure, variant=variant, **settings)
    return {"variant": variant, **settings, "edits": str(arguments.edits), **cell}


def measure(variant: str, edits: Path, num_edits: int, dtype: str, threads: int, **settings: Any) -> dict[str, Any]:
    """Train one variant in this process; return its figures."""
    torch.set_num_threads(threads)
    model, tokenizer = load(dtype)
    first_edits = read_edits(edits)[:num_edits]
    loaded = memory_mib()["VmRSS"]
    found = (plain if variant == "plain" else train)(model, tokenizer, first_edits, **settings)
    found |= {"num_edits": len(first_edits), "loaded_mib": loaded, "peak_mib": memory_mib()["VmHWM"]}
    if variant == "ours" and dtype == "float32":
        num_tokens, num_scored = count_tokens(encode_edits(first_edits, tokenizer), settings["batch_size"])
        gflop = tail_flops(num_tokens, num_scored, settings["layer"], model.config) / 1e9
        found |= {"num_tokens": num_tokens, "num_scored": num_scored, "tail_gflop": gflop}
    return found


# ---------------------------------------------------------------------- the two variants


def plain(
    model: Any, tokenizer: Any, edits: Any, layer: int, epochs: int, batch_size: int, learning_rate: float
) -> dict[str, Any]:
    """Train the layer's own weight by the published loop: the whole model, padded batches, all logits."""
    encoded = encode_edits(edits, tokenizer)  # for its target spans: both variants score the same tokens
    weight = model.model.layers[layer].mlp.down_proj.weight
    model.eval().requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=learning_rate)
    batches = EditBatches(len(encoded), batch_size, SEED)
    losses: list[float] = []
    seconds: list[float] = []
    while len(losses) < epochs and (not losses or losses[-1] >= LOSS_FLOOR):
        batches.epoch, begun, total = len(losses), time.perf_counter(), 0.0
        for batch in batches:
            loss = plain_loss(model, [encoded[index] for index in batch], tokenizer.eos_token_id)
            total += loss.item() * len(batch)
            if loss.item() >= LOSS_FLOOR:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(total / len(encoded))
        seconds.append(time.perf_counter() - begun)
    return {"epoch_seconds": seconds, "epoch_losses": losses}


def plain_loss(model: nn.Module, edits: Sequence[EncodedEdit], pad_token_id: int) -> torch.Tensor:
    """Return the mean over edits of the mean -log p of their target tokens (arXiv 2509.22072v4)."""
    input_ids = pad_sequence([edit.input_ids for edit in edits], batch_first=True, padding_value=pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(edit.input_ids) for edit in edits], batch_first=True)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    for row, edit in enumerate(edits):
        labels[row, : edit.target_start] = -100
    device = next(model.parameters()).device
    input_ids, attention_mask, labels = input_ids.to(device), attention_mask.to(device), labels.to(device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits.float()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return (losses.sum(dim=1) / (labels[:, 1:] != -100).sum(dim=1)).mean()


# ---------------------------------------------------------------------- the arithmetic that cannot be saved


def count_tokens(encoded: EncodedEdits, batch_size: int) -> tuple[int, int]:
    """Return, of one epoch, the tokens whose states are needed and those scored.

    Under a causal mask a token's state follows from the tokens up to it: equal beginnings within a batch need one
    state. The last token of an edit predicts nothing.
    """
    num_tokens = num_scored = 0
    for batch in EditBatches(len(encoded), batch_size, SEED):
        ids = [encoded[index].input_ids.tolist() for index in batch]
        num_tokens += len({tuple(row[:end]) for row in ids for end in range(1, len(row))})
        num_scored += sum(len(row) - encoded[index].target_start for row, index in zip(ids, batch, strict=True))
    return num_tokens, num_scored


def tail_flops(num_tokens: int, num_scored: int, layer: int, config: Any) -> int:
    """Return the least arithmetic of one epoch with the states that enter `layer`'s down_proj at hand.

    Matrix products alone: attention between a few tens of tokens, norms, activations and Adam are left out. A product
    of one token with a weight of n values is 2 n operations.

    Args:
        num_tokens: tokens whose states are needed, of all batches.
        num_scored: target tokens.
        layer: the edited layer, counted from 0.
        config: the model's, of the Llama kind.
    """
    hidden, last = config.hidden_size, config.num_hidden_layers - 1
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query_and_output = 2 * hidden * head_dim * config.num_attention_heads
    key_and_value = 2 * hidden * head_dim * config.num_key_value_heads
    down = hidden * config.intermediate_size
    mlp = 3 * down
    # the edited down_proj: its output, and its weight's gradient; what enters it is frozen and wants none
    edited = (num_scored if layer == last else num_tokens) * down
    # behind it nothing is trained: the output, and the gradient of the input
    between = max(last - layer - 1, 0) * num_tokens * (query_and_output + key_and_value + mlp)
    # every token is attended to in the last layer, but only what is scored leaves it
    final = 0 if layer == last else num_tokens * key_and_value + num_scored * (query_and_output + mlp)
    head = num_scored * hidden * config.vocab_size
    forward_and_backward = 2
    return forward_and_backward * 2 * (edited + between + final + head)


def matrix_gflops(repeats: int = 9) -> dict[str, float]:
    """Return the float32 rate of products with the tail's shapes: an MLP's and the head's."""
    rates = {}
    for rows, inner, columns in ((512, 576, 1536), (512, 576, 49152)):
        one, other = torch.randn(rows, inner), torch.randn(inner, columns)
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            torch.mm(one, other)
            seconds.append(time.perf_counter() - begun)
        rates[f"({rows}, {inner}) x ({inner}, {columns})"] = 2e-9 * rows * inner * columns / median(seconds)
    return rates


# ---------------------------------------------------------------------- tables and figures


def compared(plain: dict[str, Any], ours: dict[str, Any], layer: int, dtype: str) -> dict[str, Any]:
    """Return one row of the table: both variants at one layer and dtype; dashes where one of them failed."""
    row: dict[str, Any] = {"layer": layer, "dtype": dtype, "edits": (plain | ours)["num_edits"]}
    one, other = (settled(cell["epoch_seconds"]) if "error" not in cell else None for cell in (plain, ours))
    row |= {"s/epoch plain": one, "s/epoch ours": other, "plain / ours": one / other if one and other else None}
    row |= {"edits/s ours": row["edits"] / other if other else None, "cache, s": ours.get("cache_seconds")}
    one, other = plain.get("peak_mib"), ours.get("peak_mib")
    row |= {"loaded, MiB": ours.get("loaded_mib"), "peak MiB plain": one, "peak MiB ours": other}
    row["peak plain / ours"] = one / other if one and other else None
    pairs = list(zip(plain.get("epoch_losses", ()), ours.get("epoch_losses", ()), strict=False))
    row |= {"last loss plain": pairs[-1][0] if pairs else None, "last loss ours": pairs[-1][1] if pairs else None}
    return row | {"largest difference": max((abs(a - b) / a for a, b in pairs), default=None)}


def against_floor(cell: dict[str, Any], gflops: float) -> dict[str, Any]:
    """Return one row: an epoch's arithmetic at the better of the matrix rates, and how far our time is from it."""
    floor, seconds = cell["tail_gflop"] / gflops, settled(cell["epoch_seconds"])
    row = {
        "layer": cell["layer"],
        "tokens": cell["num_tokens"],
        "scored": cell["num_scored"],
        "GFLOP/epoch": cell["tail_gflop"],
        "floor, s": floor,
    }
    return row | {"s/epoch ours": seconds, "ours / floor": seconds / floor}


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    labels = [f"layer {row['layer']}\n{row['dtype']}" for row in rows]
    with figure(path) as axes:
        for axis, (prefix, title) in zip(
            axes, (("s/epoch", "seconds an epoch"), ("peak MiB", "peak MiB")), strict=False
        ):
            for offset, variant in enumerate(VARIANTS):
                heights = [row[f"{prefix} {variant}"] or 0.0 for row in rows]
                places = [place + 0.4 * offset - 0.2 for place in range(len(rows))]
                axis.bar_label(axis.bar(places, heights, 0.38, label=variant), fmt=shown, fontsize=7)
            axis.set_xticks(range(len(rows)), labels, fontsize=7)
            axis.set_title(title)
            axis.margins(y=0.2)  # room for the legend
            axis.legend(loc="upper right", ncols=2)


if __name__ == "__main__":
    main()
