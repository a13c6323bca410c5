"""Processor seconds until 98 % of some edits are learned: the published loop written plainly, and both recipes.

The plain loop trains the same layer's weight at the same rate, runs the whole model on padded batches, and stops after
the first epoch in which the model answers enough edits; what it takes to find that out is not counted. The recipes run
by their defaults with `stop_at_learned`, and all that they do counts: preparing, training, and finding out. Every
variant has a process of its own and plain text.
"""

from __future__ import annotations

import argparse
import sys
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
from peft_locft.data.encoding import encode_edits
from peft_locft.evaluation import EditEvaluator
from peft_locft.training.batches import EditBatches
from peft_locft.training.recipes import RECIPES
from peft_locft.tuner.presets import default_location

from .common import in_own_process, load, machine, markdown_table, write_json
from .speed import LOSS_FLOOR, SEED, plain_loss

VARIANTS = ("plain", "published", "balanced")
MOST_EPOCHS = 50
PLAIN_BATCH = 100  # of the paper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True, help="a file that read_edits reads")
    parser.add_argument("--num_edits", type=int, default=100, help="take so many")
    parser.add_argument("--skip", type=int, default=0, help="pass over so many edits first")
    parser.add_argument("--share", type=float, default=0.98, help="of the edits, to be learned")
    parser.add_argument("--plain_batch", type=int, default=PLAIN_BATCH, help="edits in a batch of the plain loop")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    settings = {key: value for key, value in vars(arguments).items() if key not in ("variants", "output")}
    print(f"{machine()}\n\n{arguments.num_edits} edits of {arguments.edits.name} from {arguments.skip}\n", flush=True)
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        rows.append({"variant": variant} | in_own_process(measure, variant=variant, **settings))
        if "plain" in arguments.variants and "seconds" in rows[0] and "seconds" in rows[-1]:
            rows[-1]["plain / this"] = f"{rows[0]['seconds'] / rows[-1]['seconds']:.1f}"
        print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)
    write_json(
        arguments.output / "time_to_quality.json", {"machine": machine(), "settings": str(settings), "rows": rows}
    )
    sys.exit(any("error" in row for row in rows))


def measure(
    variant: Any, edits: Path, num_edits: int, skip: int, share: float, plain_batch: int, dtype: str, threads: int
) -> dict[str, Any]:
    """Train one variant in this process; return its figures."""
    torch.set_num_threads(threads)
    base, tokenizer = load(dtype)
    chosen = read_edits(edits, on_conflict="last")[skip:][:num_edits]
    if variant == "plain":
        return plain(base, tokenizer, chosen, share, plain_batch)
    model = get_peft_model(base, LocFTConfig() if variant == "published" else balanced_config(base))
    begun = time.process_time()
    args = BreadthFirstConfig(
        recipe=variant, stop_at_learned=share, preserve_cache_dir="off", disable_tqdm=True, report_to=[]
    )
    trainer = BreadthFirstTrainer(model=model, args=args, train_dataset=chosen, processing_class=tokenizer)
    trainer.train()
    seconds = time.process_time() - begun
    return figures(len(trainer.epoch_losses), seconds, answered(model, tokenizer, chosen))


def plain(base: Any, tokenizer: Any, edits: Any, share: float, batch_size: int) -> dict[str, Any]:
    """Train the weight that `LocFTConfig()` names by the published loop, as `speed.plain` does."""
    (name,) = default_location(base).target_modules
    weight = base.get_submodule(name).weight
    base.eval().requires_grad_(False)
    weight.requires_grad_(True)
    rate = RECIPES["published"]["relative_learning_rate"] * float(weight.detach().float().square().mean().sqrt())
    optimizer = torch.optim.Adam([weight], lr=rate)
    encoded = encode_edits(edits, tokenizer)
    batches = EditBatches(len(encoded), batch_size, SEED)
    seconds, learned, epochs = 0.0, 0.0, 0
    while learned < share and epochs < MOST_EPOCHS:
        batches.epoch, begun = epochs, time.process_time()
        for batch in batches:
            loss = plain_loss(base, [encoded[index] for index in batch], tokenizer.eos_token_id)
            if loss.item() >= LOSS_FLOOR:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seconds, epochs = seconds + time.process_time() - begun, epochs + 1
        learned = answered(base, tokenizer, edits)
    return figures(epochs, seconds, learned)


def answered(model: Any, tokenizer: Any, edits: Any) -> float:
    """Return the share of edits that are answered with their targets."""
    asked = EvaluationConfig(protocols=["generation"], max_new_tokens=16)
    evaluator = EditEvaluator(model, tokenizer, [edit_alone(edit) for edit in edits], asked, progress=False)
    return float(evaluator.evaluate(model).results["reliability_exact_match"].after.value)


def edit_alone(edit: Any) -> Any:
    return type(edit)(prompt=edit.prompt, target=edit.target, subject=edit.subject)


def figures(epochs: int, seconds: float, learned: float) -> dict[str, Any]:
    return {"epochs": epochs, "learned": round(learned, 3), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
