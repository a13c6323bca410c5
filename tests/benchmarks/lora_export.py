"""What smaller forms of an adapter keep: the share of the delta and the answers, on SmolLM2-135M and the demo's edits.

Trains the demo's adapter once (examples/demo.py has the recipe), then saves it with fewer bits or values and as LoRA
adapters of several ranks, loads each and asks it the edits, by the published protocol.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig, export_lora, export_small, read_edits
from peft_locft.adapters import read_adapter
from peft_locft.adapters.lora_export import kept_by_rank
from peft_locft.evaluation.config import EvaluationConfig
from peft_locft.evaluation.evaluator import evaluate_edits

from .common import machine, markdown_table, write_json

METRICS = {
    "reliability": "reliability_exact_match",
    "generalization": "generalization_exact_match",
    "locality": "locality_first_word_unchanged",
}
SMALLER: list[dict[str, Any]] = [
    {"delta_dtype": "bfloat16"},
    *({"delta_dtype": "bfloat16", "density": share} for share in (0.5, 0.2, 0.1, 0.05)),
]


def main() -> None:
    from demo import FACTS
    from smollm2 import load_smollm2

    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    model, tokenizer = load_smollm2()
    tokenizer.chat_template = None  # plain text, as in the published protocol
    edits = read_edits(FACTS)[: arguments.num_edits]
    trained = arguments.output / "adapter"
    if not (trained / "adapter_config.json").exists():
        model = train(model, tokenizer, edits, trained, arguments.epochs).unload()
    forms = {"as trained": (trained, 1.0)}
    for form in SMALLER:
        name = ", ".join([form["delta_dtype"], *(["top {density:g}".format(**form)] if len(form) > 1 else [])])
        small = export_small(trained, arguments.output / name.replace(" ", "-"), **form)
        forms[name] = (small.path, small.share_kept)
    for rank in arguments.ranks:
        lora = export_lora(trained, arguments.output / f"lora-{rank}", rank=rank)
        forms[f"LoRA, rank {rank}"] = (lora.path, lora.share_kept)
    rows = []
    for name, (folder, share) in forms.items():
        loaded = PeftModel.from_pretrained(model, folder)
        rows.append({"form": name} | measured(folder, share, evaluated(loaded, tokenizer, edits)))
        model = loaded.unload()
        print(f"{rows[-1]}", flush=True)
    (delta,) = read_adapter(trained).values()
    energies = kept_by_rank(delta)
    needed = {f"{energy:g}": int((energies < energy).sum()) + 1 for energy in (0.5, 0.9, 0.95, 0.99)}
    print(f"\n{markdown_table(rows)}\n\nrank that keeps so much of the delta, {tuple(delta.shape)}: {needed}")
    write_json(arguments.output / "lora_export.json", {"machine": machine(), "table": rows, "ranks": needed})


LAYER = 24  # late, where general ability is kept best
RECIPE = {"learning_rate": 5e-3, "per_device_train_batch_size": 20}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256], help="of LoRA")
    parser.add_argument("--num_edits", type=int, default=78, help="take so many of the demo's")
    parser.add_argument("--epochs", type=int, default=25, help="passes over them")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark_results/lora_export"), help="folder to write to"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    return parser.parse_args()


def train(model: Any, tokenizer: Any, edits: Any, folder: Path, epochs: int) -> PeftModel:
    """Train the demo's edits, and save."""
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[LAYER], task_type="CAUSAL_LM")
    recipe: dict[str, Any] = RECIPE | {"num_train_epochs": epochs}
    args = BreadthFirstConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **recipe)
    trainer = BreadthFirstTrainer(
        model=get_peft_model(model, config), args=args, train_dataset=edits, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return trainer.model


def evaluated(model: PeftModel, tokenizer: Any, edits: Any) -> dict[str, float]:
    report = evaluate_edits(model, tokenizer, edits, EvaluationConfig(protocols=["generation"]), progress=False)
    return {name: report[metric].after.value for name, metric in METRICS.items()}


def measured(folder: Path, share: float, metrics: dict[str, float]) -> dict[str, Any]:
    data = (folder / "adapter_model.safetensors").read_bytes()
    # with five digits, for rounding to 16 bits loses millionths
    return {"kB": len(data) / 1e3, "zipped kB": len(zlib.compress(data)) / 1e3, "share kept": f"{share:.5f}"} | metrics


if __name__ == "__main__":
    main()
