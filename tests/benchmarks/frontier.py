"""Where edits are written and by which tokens: what generalizes, and what other facts about a subject pay for it.

Every setting is the balanced recipe with the fields of its row. It trains the same edits of SmolLM2-135M as plain
text, from the same base, and is evaluated on what it has not seen: rephrasings, the data set's locality probes, other
facts about the edited subjects, and a text. A setting that is in the output folder already is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
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

from .common import machine, markdown_table, write_json

EARLY, MIDDLE = [4, 5, 6, 7, 8], [13, 14, 15, 16, 17]  # of 30 layers
OTHER_FACTS = {"retained_relations": 4, "retained_per_edit": 2.0}
# layers, `None` being those of `balanced_config`, and fields of BreadthFirstConfig
SETTINGS: dict[str, tuple[list[int] | None, dict[str, Any]]] = {
    "late, all tokens": (None, {}),
    "late, all tokens, no damping": (None, {"preserve_soft_strength": 0.0}),
    "late, all tokens, no other subjects retained": (None, {"retained_subjects": 0}),
    "late, all tokens, other facts retained": (None, OTHER_FACTS),
    "early, all tokens": (EARLY, {}),
    "middle, all tokens": (MIDDLE, {}),
    "early, from the subject": (EARLY, {"gradient_tokens": "from_subject"}),
    "early, from the subject, no damping": (EARLY, {"gradient_tokens": "from_subject", "preserve_soft_strength": 0.0}),
    "early, from the subject, other facts retained": (EARLY, {"gradient_tokens": "from_subject"} | OTHER_FACTS),
    "early, subject": (EARLY, {"gradient_tokens": "subject"}),
    "early, subject, other facts retained": (EARLY, {"gradient_tokens": "subject"} | OTHER_FACTS),
}
METRICS = {
    "reliability": "reliability_exact_match",
    "generalization": "generalization_exact_match",
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
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    edits = read_edits(arguments.edits, on_conflict="last")[arguments.skip :][: arguments.num_edits]
    print(f"{machine()}\n\n{len(edits)} edits of {arguments.edits.name} from {arguments.skip}\n", flush=True)
    rows = []
    for name in arguments.settings:
        path = arguments.output / f"{arguments.edits.stem}_{arguments.skip}_{len(edits)}_{name.replace(' ', '_')}.json"
        if not path.exists():
            write_json(path, {"machine": machine(), "row": measured(name, edits, arguments)})
        rows.append({"setting": name} | json.loads(path.read_text())["row"])
        print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)


def measured(name: str, edits: Any, arguments: Any) -> dict[str, Any]:
    """Train one setting and evaluate it."""
    from smollm2 import load_smollm2

    base, tokenizer = load_smollm2(dtype=torch.bfloat16)
    tokenizer.chat_template = None
    layers, fields = SETTINGS[name]
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=layers) if layers else balanced_config(base)
    model = get_peft_model(base, config)
    begun = time.process_time()  # other work on the machine does not count
    args = BreadthFirstConfig(recipe="balanced", disable_tqdm=True, report_to=[], **fields)
    trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=edits, processing_class=tokenizer)
    trainer.train()
    seconds = time.process_time() - begun
    asked = EvaluationConfig(
        protocols=["generation"], probes=["locality_rings"], max_new_tokens=16, max_text_tokens=16_384
    )
    results = EditEvaluator(model, tokenizer, edits, asked, text=arguments.text).evaluate(model).results
    perplexity = results["perplexity"]
    assert perplexity.before is not None
    return (
        {"epochs": len(trainer.epoch_losses), "processor seconds": round(seconds)}
        | {metric: f"{results[key].after.value:.2f}" for metric, key in METRICS.items()}
        | {"perplexity rise": f"{perplexity.after.value - perplexity.before.value:.2f}"}
    )


if __name__ == "__main__":
    main()
