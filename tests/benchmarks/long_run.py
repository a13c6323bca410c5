"""One long run of BreadthFirstTrainer on SmolLM2-135M: time, memory and loss by epoch, and reliability at the end.

Reliability is `evaluate_edits`' reliability_exact_match.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_locft import Edit, EvaluationConfig, evaluate_edits, read_edits

from .common import figure, load, machine, markdown_table, memory_mib, parser_for, settled, train, write_json


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    model, tokenizer = load(arguments.dtype)
    edits = read_edits(arguments.edits)[: arguments.num_edits]
    names = ("layer", "epochs", "batch_size", "learning_rate")
    begun = time.perf_counter()
    run = train(model, tokenizer, edits, **{name: getattr(arguments, name) for name in names}, disable_tqdm=False)
    trained, peak = time.perf_counter(), memory_mib()["VmHWM"]
    rows = [
        {"epoch": epoch, "loss": loss, "seconds": seconds, "MiB": memory["VmRSS"], "anonymous MiB": memory["RssAnon"]}
        for epoch, (loss, seconds, memory) in enumerate(
            zip(run["epoch_losses"], run["epoch_seconds"], run["memory_mib"][1:], strict=True), start=1
        )
    ]
    print(f"\n{markdown_table(rows)}", flush=True)
    prompts = [Edit(prompt=edit.prompt, target=edit.target) for edit in edits]
    report = evaluate_edits(model, tokenizer, prompts, EvaluationConfig(protocols=["generation"]))
    summary = {
        "edits": len(edits),
        "minutes": (trained - begun) / 60,
        "edits/s": len(edits) / settled(run["epoch_seconds"]),
        "cache, s": run["cache_seconds"],
        "peak MiB": peak,
        "reliability": report["reliability_exact_match"].after.value,
        "minutes to generate": (time.perf_counter() - trained) / 60,
    }
    print(f"\n{markdown_table([summary])}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    write_json(
        arguments.output / "long_run.json",
        {"machine": machine(), "arguments": settings, "summary": summary, "table": rows},
    )
    draw(arguments.output / "long_run.png", rows)


def parse() -> argparse.Namespace:
    parser = parser_for(__doc__, epochs=25, num_edits=3000)
    parser.add_argument("--layer", type=int, default=20, help="its down_proj is edited; of 30, from 0")
    parser.add_argument("--batch_size", type=int, default=100, help="edits in a batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    return parser.parse_args()


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    epochs = [row["epoch"] for row in rows]
    with figure(path) as axes:
        if not axes:
            return
        axes[0].plot(epochs, [row["loss"] for row in rows], marker="o")
        axes[0].set(title="loss", xlabel="epoch", yscale="log")
        for name in ("MiB", "anonymous MiB"):
            axes[1].plot(epochs, [row[name] for row in rows], marker="o", label=name)
        top = 1.2 * max(row["MiB"] for row in rows)
        axes[1].set(title="resident memory", xlabel="epoch", ylim=(0, top))
        axes[1].legend()


if __name__ == "__main__":
    main()
