"""Every protocol of the evaluation on SmolLM2-135M, for the recipes: before and after, with chance levels.

Also how long it takes: the processor seconds of an evaluation with everything on, as a multiple of the default one,
on an adapter that is not trained. A recipe whose adapter is in the output folder already is not trained again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from peft_locft import BreadthFirstConfig, EvaluationConfig, EvaluationReport, LocFTConfig, read_edits, train_edits
from peft_locft.evaluation import EditEvaluator
from peft_locft.workflows.evaluate import evaluate_model

from .common import machine, markdown_table, parser_for

EVERYTHING: dict[str, Any] = {"contexts": ["all"], "probes": ["all"]}
RECIPES = ("published", "balanced")


def main() -> None:
    from smollm2 import smollm2_folder

    parser = parser_for(__doc__, epochs=0, num_edits=50)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="columns")
    parser.add_argument("--num_timed", type=int, default=0, help="edits to time the evaluation on; 0: do not")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    edits = read_edits(arguments.edits, on_conflict="last")
    if arguments.num_timed:
        print(seconds_of(edits[: arguments.num_timed]), flush=True)
    reports = {}
    for recipe in arguments.recipes:
        folder = arguments.output / f"{arguments.edits.stem}_{arguments.num_edits}_{recipe}"
        if not (folder / "adapter_config.json").exists():
            args = BreadthFirstConfig(
                output_dir=str(folder), recipe=recipe, chat_template="off", report_to=[], disable_tqdm=True
            )
            train_edits(smollm2_folder(), edits[: arguments.num_edits], args=args, dtype="bfloat16")
        reports[recipe] = evaluated(folder, edits[: arguments.num_edits])
    if reports:
        print(f"\n{arguments.num_edits} edits of {arguments.edits.name}\n\n{table(reports)}")
        print("\n".join(dict.fromkeys(note for report in reports.values() for note in report.notes)))


def evaluated(adapter: Path, edits: Any) -> EvaluationReport:
    folder = adapter / "evaluation"
    if not (folder / "evaluation.json").exists():
        args = EvaluationConfig(**EVERYTHING)
        evaluate_model(None, edits, args, adapter=adapter, output_dir=folder, dtype="bfloat16")
    return EvaluationReport.load(folder)


def table(reports: dict[str, EvaluationReport]) -> str:
    """Return the metrics as rows: chance, before the edits, and after them by recipe."""
    first = next(iter(reports.values()))
    rows = []
    for name, result in first.results.items():
        before = None if result.before is None else result.before.value
        after: dict[str, Any] = {recipe: report.results[name].after.value for recipe, report in reports.items()}
        rows.append({"metric": name, "chance": result.chance, "before": before, **after})
    return markdown_table(rows)


def seconds_of(edits: Any) -> str:
    """Return in words how long an evaluation takes, by default and with everything on."""
    from smollm2 import load_smollm2

    base, tokenizer = load_smollm2(dtype=torch.bfloat16)
    model = get_peft_model(base, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[20]))
    timed = []
    # the first one checks the model's short cuts, once for all evaluations
    for number, fields in ((4, EVERYTHING), (len(edits), {}), (len(edits), EVERYTHING)):
        begun = time.process_time()
        EditEvaluator(model, tokenizer, edits[:number], EvaluationConfig(**fields), progress=False).evaluate()
        timed.append(time.process_time() - begun)
    _, default, everything = timed
    return (
        f"{len(edits)} edits: {default:.0f} processor seconds by default, {everything:.0f} with everything on, "
        f"{everything / default:.1f} times as long"
    )


if __name__ == "__main__":
    main()
