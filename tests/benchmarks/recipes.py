"""The recipes side by side: what edits of SmolLM2-135M learn, how they generalize, and what they leave alone.

Each setting trains the same edits from the same base, and is evaluated on their prompts, rephrasings and locality
probes and on a text. No setting has seen any of these but the prompts: what is kept comes from the base itself.
A setting that is in the output folder already is not run again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig, balanced_config, read_edits
from peft_locft.evaluation.config import EvaluationConfig
from peft_locft.evaluation.evaluator import EditEvaluator

from .common import machine, markdown_table, parser_for, write_json

PUBLISHED_LAYER = [20]
AUGMENTED = {"num_prefixes": 5, "variants_per_epoch": 0.5}
PRESERVED = {"retained_subjects": 4, "retained_per_edit": 1.0, "retained_weight": 2.0, "preserve_soft_strength": 20.0}
# of which the rate falls, beside a published one that stays at 5e-3
BALANCED = {"recipe": "balanced", "learning_rate": 8e-3}
# by layers, where they are not those of `balanced_config`, and by fields of BreadthFirstConfig
SETTINGS: dict[str, tuple[list[int] | None, dict[str, Any]]] = {
    "published": (PUBLISHED_LAYER, {}),
    "+ augmentation": (PUBLISHED_LAYER, AUGMENTED),
    "+ preservation": (PUBLISHED_LAYER, PRESERVED),
    "balanced": (None, BALANCED),
}
METRICS = {
    "reliability": "reliability_exact_match",
    "generalization": "generalization_exact_match",
    "first word of locality unchanged": "locality_first_word_unchanged",
    "perplexity": "perplexity",
}
AXES = ("generalization", "first word of locality unchanged")
LINES = (("#2f6fb4", "o"), ("#b35c00", "s"), ("#1c8a5f", "^"))


def main() -> None:
    from smollm2 import load_smollm2

    parser = parser_for(__doc__, epochs=25, num_edits=500)
    parser.add_argument("--text", type=Path, required=True, help="for perplexity, not seen in training")
    parser.add_argument("--preserve_text", default="generated", help="to preserve: another text than that")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="columns")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    edits = read_edits(arguments.edits, on_conflict="last")[: arguments.num_edits]
    base, tokenizer = load_smollm2(dtype=torch.bfloat16)
    tokenizer.chat_template = None  # plain text, as in the published protocol
    evaluator = None
    rows = []
    for name in arguments.settings:
        path = arguments.output / f"{arguments.edits.stem}_{len(edits)}_{name.replace(' ', '')}.json"
        if not path.exists():
            layers, fields = SETTINGS[name]
            at_layers = LocFTConfig(target_modules=["down_proj"], layers_to_transform=layers)
            model = get_peft_model(base, at_layers if layers else balanced_config(base))
            found = train(model, tokenizer, edits, fields, arguments)
            if evaluator is None:
                asked = EvaluationConfig(protocols=["generation"])
                evaluator = EditEvaluator(model, tokenizer, edits, asked, text=arguments.text)
            report = evaluator.evaluate(model)
            found |= {metric: cell(report.results[key]) for metric, key in METRICS.items()}
            where = sorted(model.targeted_module_names)
            write_json(path, {"machine": machine(), "modules": where, "fields": fields, "row": found})
            base = model.unload()
        rows.append({"setting": name} | json.loads(path.read_text())["row"])
        print(rows[-1], flush=True)
    print(f"\n{len(edits)} edits of {arguments.edits.name}\n\n{markdown_table(rows)}")
    draw_frontier(arguments.output)


def train(model: Any, tokenizer: Any, edits: Any, fields: dict[str, Any], arguments: Any) -> dict[str, Any]:
    begun = time.process_time()  # other work on the machine does not count
    plain = {"num_train_epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
    args = BreadthFirstConfig(
        output_dir=str(arguments.output / "training"),
        per_device_train_batch_size=20,
        report_to=[],
        preserve_text=arguments.preserve_text,
        **(fields if "recipe" in fields else plain | fields),
    )
    trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=edits, processing_class=tokenizer)
    trainer.train()
    seconds = round(time.process_time() - begun)
    return {
        "epochs": len(trainer.epoch_losses),
        "loss": round(trainer.epoch_losses[-1], 4),
        "processor seconds": seconds,
    }


def draw_frontier(folder: Path) -> None:
    """Draw what is unchanged against what generalizes: a point a setting, a line a set of edits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    sets = sorted({path.name.rpartition("_")[0] for path in folder.glob("*_*_*.json")})
    for (colour, marker), edits in zip(LINES, sets, strict=False):
        points = {}
        for name in SETTINGS:
            path = folder / f"{edits}_{name.replace(' ', '')}.json"
            if path.exists():
                row = json.loads(path.read_text())["row"]
                points[name] = [value_of(row[metric]) for metric in AXES]
        across, up = zip(*points.values(), strict=True)
        axes.plot(across, up, marker=marker, color=colour, label=edits.replace("_3k_", ", ") + " edits")
        for name, point in points.items():
            axes.annotate(name, (point[0], point[1]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel=AXES[0], ylabel=AXES[1], ylim=(0, 1))
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(folder / "recipes.png", dpi=160)


def value_of(text: str) -> float:
    return float(text.split()[0])


def cell(result: Any) -> str:
    after, before = result.after, result.before
    text = f"{after.value:.3f} [{after.low:.3f}, {after.high:.3f}]"
    return text if before is None else f"{text} (before: {before.value:.3f})"


if __name__ == "__main__":
    main()
