"""Where edits are written and by which tokens: what generalizes, and what other facts about a subject pay for it.

Every setting is a recipe with the fields of its row. It trains the same edits of SmolLM2-135M as plain text, from the
same base, once a seed, and is evaluated on what it has not seen: rephrasings, the data set's locality probes, other
facts about the edited subjects, and a text. A run that is in the output folder already is not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    EvaluationConfig,
    LocFTConfig,
    balanced_config,
    read_edits,
)
from peft_locft.evaluation import EditEvaluator

from .common import load, machine, markdown_table, write_json

EARLY, MIDDLE, LATE = [5, 6, 7], [13, 14, 15], [22, 23, 24]  # of 30 layers
BOTH = [*EARLY, *LATE]
SUBJECTS_ALONE = {"retained_relations": 0, "retained_per_edit": 1.0, "retained_weight": 1.0}
AUTO = SUBJECTS_ALONE | {"gradient_tokens": "auto", "relative_learning_rate": 0.04}
ALL = SUBJECTS_ALONE | {"gradient_tokens": "all", "relative_learning_rate": 0.06}  # of half as many matrices
OTHER_FACTS = {"retained_relations": 4, "retained_per_edit": 1.5, "retained_weight": 2.0}
# layers, `None` being those of the recipe, and fields of BreadthFirstConfig beside the balanced recipe
SETTINGS: dict[str, tuple[list[int] | None, dict[str, Any]]] = {
    "published": (None, {"recipe": "published"}),
    "balanced": (None, {}),
    "late, all tokens": (LATE, ALL),
    "late, all tokens, no damping": (LATE, ALL | {"preserve_soft_strength": 0.0}),
    "late, all tokens, no other subjects retained": (LATE, ALL | {"retained_subjects": 0}),
    "late, all tokens, other facts retained": (LATE, ALL | OTHER_FACTS),
    "middle, all tokens": (MIDDLE, ALL),
    "early, all tokens": (EARLY, ALL),
    "early, from the subject": (EARLY, ALL | {"gradient_tokens": "from_subject"}),
    "early, subject": (EARLY, ALL | {"gradient_tokens": "subject"}),
    "early, subject, other facts retained": (EARLY, ALL | {"gradient_tokens": "subject"} | OTHER_FACTS),
    "both, all tokens": (BOTH, AUTO | {"gradient_tokens": "all"}),
    "both, auto": (BOTH, AUTO),
    "both, auto, no damping": (BOTH, AUTO | {"preserve_soft_strength": 0.0}),
    "both, auto, other facts retained": (BOTH, AUTO | OTHER_FACTS),
}
METRICS = {
    "reliability": "reliability_exact_match",
    "generalization": "generalization_exact_match",
    "by tokens": "generalization_token_accuracy",
    "more probable": "generalization_more_probable",
    "other subjects unchanged": "locality_first_word_unchanged",
    "same subject unchanged": "locality_same_subject_first_word_unchanged",
    "same subject says target": "locality_same_subject_says_target",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True, help="a file that read_edits reads")
    parser.add_argument("--num_edits", type=int, default=200, help="take so many")
    parser.add_argument("--skip", type=int, default=0, help="pass over so many edits first")
    parser.add_argument("--text", type=Path, required=True, help="for perplexity, not seen in training")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="one run each; a row is their mean")
    parser.add_argument("--drop_subjects", action="store_true", help="train without the edits' subjects")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    edits = read_edits(arguments.edits, on_conflict="last")[arguments.skip :][: arguments.num_edits]
    print(f"{machine()}\n\n{len(edits)} edits of {arguments.edits.name} from {arguments.skip}\n", flush=True)
    benchmark = Benchmark(edits, arguments)
    rows = []
    for name in arguments.settings:
        rows.append({"setting": name} | mean_row([benchmark.run(name, seed) for seed in arguments.seeds]))
        print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)


def mean_row(runs: list[dict[str, float]]) -> dict[str, str]:
    """Return a row of means, with the smallest and the largest value where there are several runs."""
    row = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        places = 0 if name in ("epochs", "processor seconds") else 2
        row[name] = f"{fmean(values):.{places}f}"
        if len(runs) > 1:
            row[name] += f" ({min(values):.{places}f} to {max(values):.{places}f})"
    return row


class Benchmark:
    """Trains and evaluates settings on one base.

    Args:
        edits: the edits.
        arguments: those of the command line.
    """

    def __init__(self, edits: Any, arguments: argparse.Namespace) -> None:
        self.edits = edits
        self.arguments = arguments
        self.base: Any = None
        self.has_said = False  # what the base answers alike

    def run(self, name: str, seed: int) -> dict[str, float]:
        """Return the figures of one setting and seed, from the output folder if they are there."""
        own, found = self.arguments, "_found_subjects" if self.arguments.drop_subjects else ""
        stem = f"{own.edits.stem}_{own.skip}_{len(self.edits)}{found}_{name.replace(' ', '_')}_{seed}"
        path = own.output / f"{stem}.json"
        if not path.exists():
            write_json(path, {"machine": machine(), "row": self._measured(name, seed)})
        row: dict[str, float] = json.loads(path.read_text())["row"]
        return row

    def _measured(self, name: str, seed: int) -> dict[str, float]:
        if self.base is None:
            self.base, self.tokenizer = load("bfloat16")
        layers, own = SETTINGS[name]
        fields: dict[str, Any] = {"recipe": "balanced", "seed": seed} | own
        config = LocFTConfig() if fields["recipe"] == "published" else balanced_config(self.base)
        if layers:
            config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=layers)
        model = get_peft_model(self.base, config)
        edits = [replace(edit, subject=None) for edit in self.edits] if self.arguments.drop_subjects else self.edits
        begun = time.process_time()  # other work on the machine does not count
        args = BreadthFirstConfig(disable_tqdm=True, report_to=[], **fields)
        trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=edits, processing_class=self.tokenizer)
        trainer.train()
        seconds = time.process_time() - begun
        figures = self._evaluated(model)
        self.base = model.unload()
        return {"epochs": len(trainer.epoch_losses), "processor seconds": seconds} | figures

    def _evaluated(self, model: Any) -> dict[str, float]:
        asked = EvaluationConfig(probes=["locality_rings"], max_new_tokens=16, max_text_tokens=16_384, on_leak="drop")
        # an evaluator leaves out what its own model was trained on, so none is shared
        evaluator = EditEvaluator(model, self.tokenizer, self.edits, asked, text=self.arguments.text, progress=False)
        report = evaluator.evaluate(model)
        if not self.has_said:
            print(alike_before(report.rows), flush=True)
        self.has_said = True
        results = report.results
        perplexity = results["perplexity"]
        assert perplexity.before is not None
        figures = {metric: results[key].after.value for metric, key in METRICS.items()}
        return figures | {"perplexity rise": perplexity.after.value - perplexity.before.value}


def alike_before(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how often the base begins its answers to an edit's prompt and to other questions with the same word.

    This is what the base itself understands: where it answers a rewording of a prompt as if it asked for something
    else, an edit of that prompt alone cannot know better.

    Args:
        rows: those of an evaluation report.
    """
    begins = {row["edit"]: first_word(row["answer_before"]) for row in rows if row["kind"] == "reliability"}
    found = {}
    for kind in ("generalization", "locality_same_subject"):
        own = [row for row in rows if row["kind"] == kind]
        found[kind] = fmean(first_word(row["answer_before"]) == begins[row["edit"]] != "" for row in own)
    return (
        "Before any edit, answers begin with the word that answers the edit's own prompt: "
        f"{found['generalization']:.2f} of rephrasings, {found['locality_same_subject']:.2f} of other facts about the "
        "subject.\n"
    )


def first_word(answer: str) -> str:
    return " ".join(answer.split()[:1]).strip(".,;:")


if __name__ == "__main__":
    main()
