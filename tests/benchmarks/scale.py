"""Many edits: speed, start-up and memory of BreadthFirstTrainer on a tiny random Llama.

The edits are random words, some 8 tokens of prompt and 3 of target; the activation cache is on the disk. What grows
with the edits, and what grows from epoch to epoch, is ours and not the model's. Every count has its own process.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_locft import Edit

from .common import figure, in_own_process, machine, markdown_table, memory_mib, parser_for, settled, train, write_json


def main() -> None:
    parser = parser_for(__doc__, epochs=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10000, 100000], help="edits of each run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    settings = {name: getattr(arguments, name) for name in ("epochs", "learning_rate", "threads")}
    cells = []
    for count in arguments.counts:
        print(f"running {count} edits", file=sys.stderr, flush=True)
        cells.append({"edits": count, **settings, **in_own_process(measure, num_edits=count, **settings)})
    rows = [row_of(cell) for cell in cells]
    print("\n" + markdown_table(rows))
    write_json(arguments.output / "scale.json", {"machine": machine(), "table": rows, "cells": cells})
    draw(arguments.output / "scale.png", [cell for cell in cells if "error" not in cell])
    sys.exit(any("error" in cell for cell in cells))


def measure(num_edits: int, epochs: int, learning_rate: float, threads: int) -> dict[str, Any]:
    """Train so many edits in this process; return times and memory."""
    from tokenizers_for_tests import make_tokenizer

    torch.set_num_threads(threads)
    model, edits, tokenizer = tiny_llama(), random_edits(num_edits), make_tokenizer("llama2")
    before = memory_mib()["RssAnon"]
    found = train(
        model, tokenizer, edits, layer=2, epochs=epochs, batch_size=100, learning_rate=learning_rate,
        loss_floor=0.0, activation_cache="disk",
    )  # fmt: skip
    # after the first step, which fills the cache, and after every epoch
    return found | {"before_mib": before, "anonymous_mib": [memory["RssAnon"] for memory in found["memory_mib"]]}


def tiny_llama() -> Any:
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def random_edits(count: int) -> list[Edit]:
    """Return the same edits for the same count, of words that the tests' tokenizers have whole."""
    from tokenizers_for_tests import SENTENCES

    words = sorted(set(" ".join(SENTENCES).replace(",", "").replace(".", "").replace("?", "").split()))
    draw = random.Random(0)
    return [
        Edit(prompt=" ".join(draw.choices(words, k=7)), target=" ".join(draw.choices(words, k=2)))
        for _ in range(count)
    ]


def row_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table; dashes where the run failed."""
    row: dict[str, Any] = {"edits": cell["edits"]}
    memory = cell.get("anonymous_mib")
    row["ms/edit"] = settled(cell["epoch_seconds"]) / cell["edits"] * 1e3 if memory else None
    row |= {"encoding, s": cell.get("encoding_seconds"), "cache, s": cell.get("cache_seconds")}
    row |= {"MiB before": cell.get("before_mib"), "MiB after the cache": f"{memory[0]:.1f}" if memory else None}
    row["MiB by epoch"] = ", ".join(f"{value:.1f}" for value in memory[1:]) if memory else None
    return row | {"growth since the cache, %": 100 * (memory[-1] / memory[0] - 1) if memory else None}


def draw(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    with figure(path) as axes:
        if not axes or not cells:
            return
        for cell in cells:
            axes[0].plot(cell["anonymous_mib"], marker="o", label=f"{cell['edits']:,} edits")
        axes[0].set(title="anonymous memory, MiB", xlabel="epochs trained (0: the cache is filled)")
        axes[0].legend()
        speed = [settled(cell["epoch_seconds"]) / cell["edits"] * 1e3 for cell in cells]
        axes[1].plot([cell["edits"] for cell in cells], speed, marker="o")
        axes[1].set(title="milliseconds an edit", xlabel="edits", xscale="log", ylim=(0, 1.2 * max(speed)))


if __name__ == "__main__":
    main()
