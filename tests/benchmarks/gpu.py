"""One run on one big GPU: laws, losses, speed and memory at the sizes of Llama-8B, Qwen2.5-7B and Qwen2.5-72B.

    python -m tests.benchmarks.gpu --toy                                     # first: seconds
    python -m tests.benchmarks.gpu --minutes 6 --output benchmark_results    # 4 to 6 minutes, an estimate

**Nobody has run it on a GPU yet.** On a CPU the toy takes 18 seconds of processor time. Its cells also run on an
emulated device (`tests/emulated_device.py`). Run it from the root of the repository, with the versions that
`pyproject.toml` asks for: a machine's own transformers may be too old. Nothing is downloaded: the weights are random
bfloat16, made on the device; the tokenizer is trained on the spot. It needs some 40 GB on the GPU (50 for the 72B
shape) and as much of the CPU's memory as there is; both are estimates. What `--minutes` leaves no time for is skipped
and named; `gpu.json` is written after every cell. With more time, `--minutes 9 --seconds_72b 250` puts more of the 72B
shape's layers on the CPU.

Every cell is a process of its own, so that nothing of one is in the next one's memory, and one that crashes does not
end the others (the toy's share one). Peaks are those of `torch.cuda.max_memory_allocated`, which fragments do not
change; set `PYTORCH_ALLOC_CONF=expandable_segments:True` yourself where memory is short. Only the first GPU is used,
unless CUDA_VISIBLE_DEVICES names another: with several, `Trainer` would split the batches.

Exit code 0: laws were checked, all hold, no cell failed. Tables go to stdout, everything to `gpu.json`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .common import machine, markdown_table, shown, write_json
from .gpu_cells import ATTENTIONS, device, evaluation, laws, layerwise, speed
from .gpu_models import LLAMA_8B, QWEN_7B, the_device
from .timed_cells import DONE, FAILED, Cell, Row, run_cells

COMPILED = ("flex_attention",)  # it may take all the time that is left: a cell of its own, at the end
EPOCHS = 25  # of the published recipe, for the seconds of a whole run


def main(argv: Sequence[str] | None = None) -> int:
    until = time.monotonic()
    arguments = parse(argv)
    until += 60 * arguments.minutes
    toy = arguments.toy or the_device() == "cpu"
    path = arguments.output / "gpu.json"

    def write(results: list[Row]) -> None:
        write_json(path, {"machine": machine(), "toy": toy, "command": sys.argv[1:], "cells": results})

    results = run_cells(planned(arguments, toy), until, share_process=toy, after_each=write)
    write(results)
    print(f"{machine()}\n\n{report(results, toy)}\n\nEverything is in {path}.")
    return exit_code(results)


def prepare_environment() -> None:
    """Set what the processes of the cells inherit, before anything asks for a GPU."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers looks for kernels of attention on the Hub
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # PEFT calls what transformers will drop


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="tiny models and few edits; without a GPU always")
    parser.add_argument("--minutes", type=float, default=6.0, help="stop after so many (6)")
    parser.add_argument("--attentions", nargs="+", help=f"default: {', '.join(ATTENTIONS)}; toy: first two")
    parser.add_argument("--counts", type=int, nargs="+", help="edits (100 1000 10000; toy: 8 24)")
    parser.add_argument("--host_gib", type=float, help="CPU memory for the 72B shape (what is free)")
    parser.add_argument(
        "--seconds_72b", type=float, default=100.0, help="for the 72B shape: more hold more layers (100)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of gpu.json")
    return parser.parse_args(argv)


def planned(arguments: argparse.Namespace, toy: bool) -> list[Cell]:
    """Return the cells, the most wanted first."""
    common = {"toy": toy}
    attentions = arguments.attentions or ATTENTIONS[: 2 if toy else None]
    compiled = [name for name in attentions if name in COMPILED]
    attentions = [name for name in attentions if name not in COMPILED]
    counts = arguments.counts or ([8, 24] if toy else [100, 1000, 10000])

    def laws_of(model: str) -> Cell:
        return Cell(f"laws, {model}", laws, common | {"model_name": model, "attentions": attentions}, 60, 5)

    def speed_of(model: str) -> list[Cell]:
        settings = common | {"model_name": model, "counts": counts}
        return [
            Cell(f"speed, {model}, {variant}", speed, settings | {"variant": variant, "seconds_each": each}, most, 5)
            for variant, each, most in (("plain", 7.0, 45), ("ours", 9.0, 60))
        ]

    seconds = arguments.seconds_72b
    cells = [
        Cell("device", device, common, 30, 1),
        laws_of(LLAMA_8B),
        *speed_of(LLAMA_8B),
        Cell("72B", layerwise, common | {"host_gib": arguments.host_gib, "seconds": seconds}, seconds + 30, 30),
        Cell("evaluation", evaluation, common | {"model_name": LLAMA_8B, "seconds_each": 8.0}, 50, 5),
        laws_of(QWEN_7B),
        *speed_of(QWEN_7B),
    ]
    if toy:  # the second model's figures tell as little as the first one's
        cells = cells[:-3]
    settings = common | {"model_name": LLAMA_8B}
    return cells + [
        Cell(f"laws, {LLAMA_8B}, {name}", laws, settings | {"attentions": [name]}, 75, 10) for name in compiled
    ]


# ---------------------------------------------------------------------- the report


def report(results: Sequence[Row], toy: bool) -> str:
    """Return all tables in Markdown."""
    parts = ["Toy sizes: the figures mean nothing.\n"] if toy else []
    about = {key: value for row in rows_of(results, "device") for key, value in row.items()}
    parts.append("; ".join(f"{key}: {shown(value)}" for key, value in about.items()))
    sections = {
        "Laws (equal bits), and losses against one edit at a time": [law_row(row) for row in rows_of(results, "laws")],
        "Losses against the plain loop": loss_rows(rows_of(results, "speed")),
        "Speed and memory against the plain loop": speed_rows(rows_of(results, "speed")),
        "Qwen2.5-72B's shape, the frozen layers on the CPU": layerwise_rows(rows_of(results, "72B")),
        "Evaluation": rows_of(results, "evaluation"),
        "Cells": [{key: value for key, value in cell.items() if key != "rows"} for cell in results],
    }
    for title, rows in sections.items():
        parts.append(f"\n## {title}\n\n{markdown_table(rows) if rows else 'Nothing was measured.'}")
    return "\n".join(parts)


def rows_of(results: Sequence[Row], prefix: str) -> list[Row]:
    """Return the rows of the cells of one kind."""
    return [row for cell in results if cell["cell"].startswith(prefix) for row in cell["rows"]]


def law_row(row: Row) -> Row:
    found = row.get("laws", {})
    broken = [law for law, holds in found.items() if not holds]
    verdict = f"BROKEN: {', '.join(broken)}" if broken else f"{len(found)} hold" if found else "-"
    columns = {"model": row["model"], "layers": row["layers"], "attention": row["attention"], "laws": verdict}
    deviations = row.get("deviations", {})
    columns |= {"losses, ours": deviations.get("ours"), "losses, padded": deviations.get("padded")}
    note = next((f"{word}: {row[word]}" for word in ("skipped", "failed") if word in row), None)
    return columns | {"note": note}


def by_variant(rows: Sequence[Row]) -> list[tuple[str, int, Row, Row]]:
    """Return model, number of edits, the plain loop's row and ours; a row that is missing is empty."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["edits"]), {})[row["variant"]] = row
    return [(*key, pair.get("plain", {}), pair.get("ours", {})) for key, pair in found.items()]


def loss_rows(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each whole epoch that both have. The first epoch of one batch is before any step."""
    table = []
    for model, num_edits, plain, ours in by_variant(rows):
        pairs = zip(plain.get("epoch_losses", ()), ours.get("epoch_losses", ()), strict=False)
        for epoch, (one, other) in enumerate(list(pairs)[:2], start=1):
            row = {"model": model, "edits": num_edits, "epoch": epoch, "plain": f"{one:.5f}", "ours": f"{other:.5f}"}
            table.append(row | {"relative deviation": abs(one - other) / abs(one)})
    return table


def speed_rows(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each model and number of edits, with the plain loop and ours side by side."""
    table = []
    for model, num_edits, plain, ours in by_variant(rows):
        epochs = [cell["epoch_seconds"] if cell else None for cell in (plain, ours)]
        before = ours.get("before_seconds")
        runs = [
            None if seconds is None else (extra + EPOCHS * seconds) / num_edits
            for seconds, extra in zip(epochs, (0.0, before or 0.0), strict=True)
        ]
        ratio = runs[0] / runs[1] if runs[0] and runs[1] else None
        row: Row = {"model": model, "edits": num_edits}
        row |= {"s/epoch, plain": epochs[0], "s/epoch, ours": epochs[1], "caching, s": ours.get("caching_seconds")}
        row |= {f"s/edit in {EPOCHS} epochs, plain": runs[0], "ours": runs[1], "plain / ours": ratio}
        row |= {"weights, GiB": ours.get("before_gib") or plain.get("before_gib")}
        row |= {"peak GiB, plain": plain.get("peak_gib"), "peak GiB, ours": ours.get("peak_gib")}
        notes = [f"{name}: {cell['note']}" for name, cell in (("plain", plain), ("ours", ours)) if cell.get("note")]
        notes += [f"ours is not {word}" for word in ("packed", "cached") if not ours.get(word, True)]
        table.append(row | {"note": "; ".join(notes) or None})
    return table


def layerwise_rows(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each figure, with the trial of three layers beside the run."""
    runs = [*rows, {}, {}][:2]
    return [{"": key, "3 layers": runs[0][key], "more": runs[1].get(key)} for key in rows[0]] if rows else []


def exit_code(results: Sequence[Row]) -> int:
    """Return 0 if laws were checked, all hold, and no cell failed; a law that nobody checked does not hold."""
    rows = rows_of(results, "laws")
    checked = [holds for row in rows for holds in row.get("laws", {}).values()]
    broken = [row for row in rows if "failed" in row] + [cell for cell in results if cell["status"] == FAILED]
    if not checked:
        print("No law was checked.", file=sys.stderr)
    for cell in results:
        if cell["status"] != DONE:
            print(f"{cell['cell']}: {cell['status']}, {cell['reason']}", file=sys.stderr)
    return 0 if checked and all(checked) and not broken else 1


if __name__ == "__main__":
    prepare_environment()
    sys.exit(main())
