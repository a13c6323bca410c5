"""What a search for a location costs against the plain way: every location trained and evaluated in full, by itself.

Seconds are of the processor, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from peft_locft import BreadthFirstConfig, EvaluationConfig, read_edits
from peft_locft.cli.arguments import named_numbers
from peft_locft.evaluation import EditEvaluator
from peft_locft.locating.module_kinds import config_of, location_of
from peft_locft.locating.plan import Candidate, num_trained, rungs
from peft_locft.locating.score import LocationScore
from peft_locft.workflows.locate import SearchPlan, search_locations
from peft_locft.workflows.trials import try_adapter

from .common import load, machine, markdown_table, parser_for, write_json


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    model, tokenizer = load("bfloat16")
    edits = read_edits(arguments.edits)[: arguments.num_edits]
    evaluation = EvaluationConfig(
        protocols=["generation", "token_accuracy"], max_text_tokens=arguments.max_text_tokens, text_window=256
    )
    rates = named_numbers("learning_rates", arguments.learning_rates)
    plan = SearchPlan(arguments.modules, arguments.layers, keep=arguments.keep, learning_rates=rates)
    args = BreadthFirstConfig(
        output_dir=str(arguments.output / "search"), use_cpu=True, disable_tqdm=True, report_to="none",
        logging_strategy="no", num_train_epochs=arguments.epochs, learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
    )  # fmt: skip
    shutil.rmtree(str(args.output_dir), ignore_errors=True)
    begun = time.process_time()
    found = search_locations(
        model, tokenizer, edits, args, plan=plan, num_edits=None, evaluation=evaluation, text=arguments.text
    )
    ours = time.process_time() - begun
    print(f"\n{found}\n\nSearched in {ours:.0f} s; now every location by itself.", flush=True)
    score = LocationScore(found.setting["score"])
    own = {module: replace(args, learning_rate=rate) for module, rate in rates.items()}
    plain = plain_search(arguments, model, tokenizer, edits, args, own, evaluation, score)
    winner = max(plain, key=lambda row: float(row["score"]))
    total = sum(float(row["seconds"]) for row in plain)
    one = total / len(plain)
    summary = {
        "plain, s": total,
        "search, s": ours,
        "search / plain": ours / total,
        "search, in plain trials": ours / one,
        "plain winner": winner["location"],
        "winner of the search": str(found.best.candidate),
    }
    large = of_32_layers(arguments.num_edits, arguments.batch_size, arguments.keep)
    print(f"\n{markdown_table(plain)}\n\n{markdown_table([summary])}\n\n{large}")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    write_json(
        arguments.output / "locate.json",
        {"machine": machine(), "arguments": settings, "summary": summary, "table": plain},
    )


def parse() -> argparse.Namespace:
    parser = parser_for(__doc__, epochs=25, num_edits=32)
    parser.add_argument("--modules", nargs="+", default=["down", "mlp"], help="kinds of modules")
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 10, 15, 20, 25], help="of 30, from 0")
    parser.add_argument("--learning_rates", nargs="+", default=[], help="of some kinds: entire-layer=1e-3 mlp=2e-3")
    parser.add_argument("--keep", type=int, default=5, help="one location in so many goes on to a longer trial")
    parser.add_argument("--batch_size", type=int, default=9, help="edits in a batch")
    parser.add_argument("--text", help="for KL: a text file")
    parser.add_argument("--max_text_tokens", type=int, default=1024, help="of that text")
    return parser.parse_args()


def plain_search(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    edits: Sequence[Any],
    args: BreadthFirstConfig,
    own: Mapping[str, BreadthFirstConfig],
    evaluation: EvaluationConfig,
    score: LocationScore,
) -> list[dict[str, Any]]:
    """Train and evaluate every location in full. What is there of an earlier run of the benchmark is taken from it."""
    rows = []
    for module in arguments.modules:
        for layer in arguments.layers:
            path = arguments.output / "plain" / f"{module}-{layer}.json"
            if not path.is_file():
                row = _plain(
                    model, tokenizer, edits, own.get(module, args), evaluation, score, module, layer, arguments.text
                )
                write_json(path, row)
            rows.append(json.loads(path.read_text()))
    return rows


def _plain(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Any],
    args: BreadthFirstConfig,
    evaluation: EvaluationConfig,
    score: LocationScore,
    module: str,
    layer: int,
    text: str | None,
) -> dict[str, Any]:
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        evaluator = EditEvaluator(model, tokenizer, edits, evaluation, text=text, progress=False)
        config = config_of(location_of(model, module, layer))
        own: dict[str, Any] = {"output_dir": folder}
        tried = try_adapter(model, tokenizer, edits, config, replace(args, **own), evaluator)
    row = {"location": str(Candidate(module, layer)), "score": score.of(tried.report)}
    print(row, flush=True)
    return row | {"epochs": len(tried.epoch_losses), "seconds": time.process_time() - begun}


def of_32_layers(num_edits: int, batch_size: int, keep: int) -> str:
    """Say what a full search of a model with 32 layers costs, in trainings of one location on all edits."""
    count = 5 * 32
    lines = []
    for edits in sorted({num_edits, 100, 300}):
        ladder = rungs(edits, batch_size, count, keep)
        words = ", ".join(f"{rung.num_edits}" for rung in ladder)
        lines.append(
            f"5 kinds of modules in 32 layers, rungs of {words} edits: {num_trained(ladder, count, keep) / edits:.1f} "
            f"trainings in full, of {count}, and what a step costs beside what it computes."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
