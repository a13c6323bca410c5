"""What the benchmarks have in common: a process a cell, clocks and memory, tables and files."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig

REPOSITORY = Path(__file__).resolve().parents[2]
# `smollm2` and `demo`, and the tests' tokenizers; a spawned process inherits the path
sys.path[:0] = [str(REPOSITORY / "examples"), str(REPOSITORY / "tests")]

MIB = 1024  # the system counts KiB


def parser_for(description: str | None, epochs: int, num_edits: int | None = None) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark takes, and of a file of edits if `num_edits` is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over all the edits")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="constant rate of Adam")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    if num_edits is not None:
        parser.add_argument(
            "--edits", type=Path, required=True, default=argparse.SUPPRESS, help="a file that read_edits reads"
        )
        parser.add_argument("--num_edits", type=int, default=num_edits, help="take so many from its beginning")
    return parser


def in_own_process(cell: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return what `cell` returns, run in a fresh process, or `{"error": …}`: the other cells go on."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(cell, **arguments).result()
        except Exception as error:  # also a process that was killed for its memory
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


def memory_mib() -> dict[str, float]:
    """Return this process' memory: `VmRSS` now, `VmHWM` at its peak, `RssAnon` without pages that files back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {name: int(fields[name][0]) / MIB for name in ("VmRSS", "VmHWM", "RssAnon")}


def load(dtype: str, *, chat_template: bool = False) -> tuple[Any, Any]:
    """Load SmolLM2-135M and its tokenizer, whole, and begin a new `VmHWM`: what loading took is not training's.

    Without its chat template everything is plain text, as in the published data and protocol.
    """
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2(dtype=getattr(torch, dtype))
    tokenizer.chat_template = tokenizer.chat_template if chat_template else None
    # a file that is mapped into memory is read when it is touched: now, so that no first step pays for it
    sum(parameter.sum() for parameter in model.parameters())
    with contextlib.suppress(OSError):  # where the system forbids it, loading counts
        Path("/proc/self/clear_refs").write_text("5")
    return model, tokenizer


class Clock(TrainerCallback):
    """Times steps and epochs, and reads the memory after the first step and after every epoch."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.memory: list[dict[str, float]] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._epoch_begun = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._step_begun)
        if len(self.steps) == 1:
            self.memory.append(memory_mib())

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(time.perf_counter() - self._epoch_begun)
        self.memory.append(memory_mib())


def train(
    model: Any,
    tokenizer: Any,
    edits: Any,
    layer: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    **recipe: Any,
) -> dict[str, Any]:
    """Edit `model`, one layer's down_proj, in place with the BreadthFirstTrainer; return times, losses, memory."""
    clock = Clock()
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[layer], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = BreadthFirstConfig(
            output_dir=folder, use_cpu=True, logging_strategy="no", num_train_epochs=epochs,
            per_device_train_batch_size=batch_size, learning_rate=learning_rate, **({"disable_tqdm": True} | recipe),
        )  # fmt: skip
        begun = time.perf_counter()
        trainer = BreadthFirstTrainer(
            get_peft_model(model, config), args, train_dataset=edits, processing_class=tokenizer, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        encoding_seconds = time.perf_counter() - begun
        trainer.train()
    return {
        "encoding_seconds": encoding_seconds,
        # the first step fills the cache
        "cache_seconds": clock.steps[0] - median(clock.steps[1:]) if clock.steps[1:] else None,
        "epoch_seconds": clock.epochs,
        "epoch_losses": trainer.epoch_losses,
        "memory_mib": clock.memory,
    }


def settled(seconds: Sequence[float]) -> float:
    """Return the median of the epochs after the first, which warms up; of one epoch, that one."""
    return median(seconds[1:] or seconds)


def machine() -> str:
    """Return one line: processor, cores, torch's threads, bfloat16 instructions, versions."""
    text = Path("/proc/cpuinfo").read_text()
    models = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")]
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch "
        f"threads, {' and '.join(flags) or 'neither avx512_bf16 nor amx_bf16'}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def shown(value: Any, digits: int = 3) -> str:
    """Return a number with so many significant digits, none as a dash, anything else as it is."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def figure(path: Path, num_axes: int = 2) -> Iterator[Sequence[Any]]:
    """Give axes side by side and save them; without matplotlib give none."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"No {path.name}: matplotlib is not installed", file=sys.stderr)
        yield ()
        return
    # by name: it is no dependency of the project, nor of its types
    importlib.import_module("matplotlib").use("Agg")
    plot = importlib.import_module("matplotlib.pyplot")
    drawn, axes = plot.subplots(1, num_axes, figsize=(5.5 * num_axes, 4), layout="constrained")
    yield list(axes)
    drawn.savefig(path, dpi=150)
    plot.close(drawn)
