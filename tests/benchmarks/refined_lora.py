"""What a LoRA adapter of a small rank keeps of an edit: truncated, refined, or trained as LoRA from the start.

SmolLM2-135M. Every adapter is asked the edits, their rephrasings and locality probes, in the form of the full delta's
training. A row whose adapter is in the output folder already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from peft_locft import (
    BreadthFirstConfig,
    EvaluationConfig,
    evaluate_model,
    export_lora,
    inspect_adapter,
    read_edits,
    train_edits,
)
from peft_locft.workflows import export_refined_lora

from .common import REPOSITORY, machine, markdown_table, write_json

FACTS = REPOSITORY / "examples" / "facts.jsonl"
METRICS = {
    "reliability": "reliability_exact_match",
    "generalization": "generalization_exact_match",
    "locality": "locality_first_word_unchanged",
}
WAYS = ("truncated", "refined", "from the start")


def main() -> None:
    from smollm2 import smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a LocFT adapter of SmolLM2-135M")
    parser.add_argument("--edits", type=Path, default=FACTS, help="what it was taught")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32], help="of LoRA")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="rows for each rank")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark_results/refined_lora"), help="folder of what is written"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base, edits = str(smollm2_folder()), read_edits(arguments.edits)
    print(f"{machine()}\n\n{len(edits)} edits\n", flush=True)
    rows = [{"adapter": "as trained", "epochs": "", "seconds": ""} | measured(arguments.adapter, base, edits)]
    print("\n".join(markdown_table(rows).splitlines()), flush=True)
    for rank in arguments.ranks:
        for way in arguments.ways:
            folder = arguments.output / f"{way.replace(' ', '_')}_{rank}"
            made = folder.with_suffix(".json")
            if not made.exists():
                write_json(made, make(way, rank, arguments.adapter, folder, base, edits))
            rows.append(
                {"adapter": f"LoRA, rank {rank}, {way}"} | json.loads(made.read_text()) | measured(folder, base, edits)
            )
            print(markdown_table(rows).splitlines()[-1], flush=True)
    write_json(arguments.output / "refined_lora.json", {"machine": machine(), "table": rows})


def make(way: str, rank: int, adapter: Path, folder: Path, base: str, edits: Any) -> dict[str, Any]:
    """Write a LoRA adapter, and return how long it took."""
    begun = time.process_time()  # other work on the machine does not count
    epochs: int | str = ""
    if way == "truncated":
        export_lora(adapter, folder, base, rank=rank)
    elif way == "refined":
        epochs = export_refined_lora(
            adapter, folder, base, rank=rank, edits=edits, dtype="bfloat16", progress=False
        ).num_epochs
    else:
        # the same module, by the published recipe
        (name,) = inspect_adapter(adapter).provenance.base_sha256
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name.removesuffix(".weight")])
        args = BreadthFirstConfig(output_dir=str(folder), report_to=[], disable_tqdm=True)
        summary = train_edits(base, edits, args=args, peft_config=config, dtype="bfloat16")
        assert summary.provenance.run is not None
        epochs = len(summary.provenance.run.training.epoch_losses)
    return {"epochs": epochs, "seconds": round(time.process_time() - begun)}


def measured(folder: Path, base: str, edits: Any) -> dict[str, Any]:
    args = EvaluationConfig(protocols=["generation"], chat_template="both")
    report = evaluate_model(base, edits, args, adapter=folder, dtype="bfloat16")
    values = {name: f"{report[metric].after.value:.2f}" for name, metric in METRICS.items()}
    return {"kB": round((folder / "adapter_model.safetensors").stat().st_size / 1e3)} | values


if __name__ == "__main__":
    main()
