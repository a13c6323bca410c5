"""Which edits survive fine-tuning of their base: SmolLM2-135M, all weights trained after the adapter was made."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from peft_locft import read_edits
from peft_locft.data import text_windows
from peft_locft.workflows import transfer_adapter

from .common import REPOSITORY, machine, markdown_table, write_json

FACTS = REPOSITORY / "examples" / "facts.jsonl"


def main() -> None:
    from smollm2 import load_smollm2, smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a LocFT adapter of SmolLM2-135M")
    parser.add_argument("--edits", type=Path, default=FACTS, help="what it was taught")
    parser.add_argument("--text", type=Path, required=True, help="to fine-tune on")
    parser.add_argument("--steps", type=int, default=50, help="of one window of 256 tokens each")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3], help="a row for each")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    edits = read_edits(arguments.edits)
    print(f"{machine()}\n\n{len(edits)} edits, {arguments.steps} steps\n", flush=True)
    rows: list[dict[str, Any]] = []
    for rate in arguments.learning_rates:
        model, tokenizer = load_smollm2(dtype=torch.float32)
        windows = text_windows(arguments.text, tokenizer, window=256, max_tokens=256 * arguments.steps, model=model)
        losses = fine_tuned(model, windows, rate)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            report = transfer_adapter(arguments.adapter, folder, edits, base_model=str(smollm2_folder()))
        for change in report.changes:
            rows.append(
                {"learning rate": rate, "loss": f"{losses[0]:.2f} → {losses[-1]:.2f}", "weight": change.name}
                | {"edit size": change.edit_size, "change": change.change, "cosine": change.cosine}
                | {"survived": report.survived}
            )
            print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)
    write_json(arguments.output / "descendants.json", {"machine": machine(), "rows": rows})


def fine_tuned(model: Any, windows: Any, rate: float) -> list[float]:
    """Train all weights by AdamW, a window a step, and return the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for window in windows:
        ids = torch.as_tensor(window)[None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    main()
