"""What `locft train` learns by its defaults: some edits, some recipes, and no flag but model, edits and output.

Each cell is a process of its own that loads the model, prepares, trains, measures what was learned, and saves. Nothing
is read from earlier preparations, so that the seconds are those of a first run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from peft_locft import BreadthFirstConfig
from peft_locft.training.config import Recipe
from peft_locft.workflows.train import train_edits

from .common import in_own_process, machine, markdown_table, memory_mib, write_json

RECIPES: tuple[Recipe, ...] = get_args(Recipe)


def main() -> None:
    from smollm2 import smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True, help="a file that read_edits reads")
    parser.add_argument("--num_edits", type=int, nargs="+", default=[1, 5, 25], help="a cell for each number")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES, help="a cell for each")
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    model = arguments.model or smollm2_folder()
    print(f"{machine()}\n\n{arguments.edits.name}\n", flush=True)
    cells: list[dict[str, Any]] = []
    for recipe in arguments.recipes:
        for count in arguments.num_edits:
            settings = {"recipe": recipe, "num_edits": count, "threads": arguments.threads}
            cells.append(in_own_process(measure, model=model, edits=arguments.edits, **settings))
            print("\n".join(markdown_table(cells).splitlines()[0 if len(cells) == 1 else -1 :]), flush=True)
            write_json(arguments.output / "first_contact.json", {"machine": machine(), "rows": cells})


def measure(model: Path, edits: Path, recipe: Recipe, num_edits: int, threads: int) -> dict[str, Any]:
    """Train in this process by the defaults of a recipe; return what was learned and what it took."""
    torch.set_num_threads(threads)
    begun = time.perf_counter()
    with TemporaryDirectory() as folder:
        args = BreadthFirstConfig(
            output_dir=folder, recipe=recipe, use_cpu=True, disable_tqdm=True, preserve_cache_dir=None
        )
        summary = train_edits(model, edits, args=args, num_edits=num_edits, on_conflict="last")
    learned = summary.learned
    run = summary.provenance.run
    assert learned is not None and run is not None
    return {
        "recipe": recipe,
        "edits": learned.num_edits,
        "learned": learned.num_learned,
        "epochs": len(run.training.epoch_losses),
        "seconds": time.perf_counter() - begun,
        "CPU seconds": time.process_time(),
        "peak MiB": memory_mib()["VmHWM"],
        "last line": str(learned),
    }


if __name__ == "__main__":
    main()
