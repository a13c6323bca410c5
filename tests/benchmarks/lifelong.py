"""An adapter that lives on against one that is trained anew: withdraws, adds and replaces edits of SmolLM2-135M.

Trains on the first edits of a file once, and then, from that adapter, withdraws some, or adds and replaces some; and
trains the same lists of edits from nothing. Seconds are of the processor, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_locft import (
    BreadthFirstConfig,
    Edit,
    EvaluationConfig,
    LocFTConfig,
    evaluate_edits,
    read_edits,
    train_edits,
    update_adapter,
)
from peft_locft.adapters import check_adapter
from peft_locft.data import EditPlan, edit_id, merge_edit_lists
from peft_locft.data.encoding import encode_prompts
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.questions import UNTIL_EOS, Question
from peft_locft.workflows.update import ANSWER_TOKENS

from .common import machine, markdown_table, parser_for, write_json

LAYER = 20


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    read = read_edits(arguments.edits, on_conflict="last")
    known, others = read[: arguments.num_edits], read[arguments.num_edits :]
    rows = [cell(arguments, "first", merge_edit_lists(known), partial(trained, arguments, known))]
    changes = cases(arguments, known, others)
    for case, new, forget in changes:
        run = partial(updated, arguments, new, forget)
        rows.append(cell(arguments, f"{case}, trained on", merge_edit_lists(known, new, forget), run))
    for case, new, forget in changes:
        plan = merge_edit_lists(known, new, forget)
        rows.append(cell(arguments, f"{case}, from nothing", plan, partial(trained, arguments, plan.edits)))
    print(f"\n{markdown_table(rows)}")
    write_json(arguments.output / "lifelong.json", {"machine": machine(), "table": rows})


def parse() -> argparse.Namespace:
    parser = parser_for(__doc__, epochs=25, num_edits=100)
    parser.set_defaults(output=Path("benchmark_results/lifelong"))
    parser.add_argument("--batch_size", type=int, default=20, help="edits in a batch")
    parser.add_argument("--withdraw", type=int, nargs="*", default=[1, 5], help="edits to withdraw, a case each")
    parser.add_argument("--add", type=int, default=10, help="edits to add, in one case with those that are replaced")
    parser.add_argument("--replace", type=int, default=5, help="edits that get another target")
    return parser.parse_args()


def cases(
    arguments: argparse.Namespace, known: Sequence[Edit], others: Sequence[Edit]
) -> list[tuple[str, list[Edit], list[str]]]:
    """Return the name of each case, its new edits and what it withdraws: spread over the known ones."""

    def spread(count: int) -> list[Edit]:
        return [known[(2 * number + 1) * len(known) // (2 * count)] for number in range(count)]

    found: list[tuple[str, list[Edit], list[str]]] = [
        (f"{count} withdrawn", [], [edit_id(edit) for edit in spread(count)]) for count in arguments.withdraw
    ]
    if arguments.add or arguments.replace:
        targets = [edit.target for edit in others[arguments.add :]]
        changed = [
            replace(edit, target=target) for edit, target in zip(spread(arguments.replace), targets, strict=False)
        ]
        found.append(
            (f"{arguments.add} added, {arguments.replace} replaced", [*others[: arguments.add], *changed], [])
        )
    return found


def recipe(arguments: argparse.Namespace, out: Path, **more: Any) -> BreadthFirstConfig:
    return BreadthFirstConfig(
        chat_template="off",  # plain text, as in the published protocol
        output_dir=str(out), use_cpu=True, disable_tqdm=True, logging_strategy="no", num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size, learning_rate=arguments.learning_rate, **more,
    )  # fmt: skip


def trained(arguments: argparse.Namespace, edits: Sequence[Edit], out: Path) -> None:
    from smollm2 import smollm2_folder

    location = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[LAYER])
    train_edits(smollm2_folder(), edits, location, recipe(arguments, out), ship_edits=True)


def updated(arguments: argparse.Namespace, new: Sequence[Edit], forget: Sequence[str], out: Path) -> None:
    args = recipe(arguments, out)
    update_adapter(arguments.output / "first", new or None, forget or None, args)


def cell(arguments: argparse.Namespace, name: str, plan: EditPlan, run: Callable[[Path], None]) -> dict[str, Any]:
    """Run and measure one row of the table; one that is there already is read."""
    out = arguments.output / name.replace(", ", "-").replace(" ", "_")
    file = out / "row.json"
    if not file.exists():
        begun = time.process_time()
        run(out)
        seconds = time.process_time() - begun
        epochs = len(check_adapter(out).provenance.to_dict()["training"]["epoch_losses"])
        write_json(file, {"case": name, "epochs": epochs, "seconds": seconds} | measured(out, plan))
    row: dict[str, Any] = json.loads(file.read_text())
    print(row, flush=True)
    return row


def measured(adapter: Path, plan: EditPlan) -> dict[str, Any]:
    """Ask an adapter what it holds, and what it has withdrawn."""
    from smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    tokenizer.chat_template = None
    edited = PeftModel.from_pretrained(model, adapter)
    changed = [*plan.added, *plan.replaced]
    everything = evaluated(edited, tokenizer, plan.edits)
    return {
        "reliability": everything["reliability"],
        "of the changed": evaluated(edited, tokenizer, changed)["reliability"] if changed else None,
        "generalization": everything["generalization"],
        "as the base": as_base(edited, tokenizer, [edit.prompt for edit in plan.withdrawn]),
        "rephrasings as the base": as_base(
            edited, tokenizer, [rephrasing for edit in plan.withdrawn for rephrasing in edit.rephrasings]
        ),
    }


def evaluated(model: PeftModel, tokenizer: Any, edits: Sequence[Edit]) -> dict[str, str]:
    """Return shares of exact answers with their intervals."""
    asked = [replace(edit, locality=(), portability=()) for edit in edits]
    report = evaluate_edits(model, tokenizer, asked, EvaluationConfig(protocols=["generation"]), progress=False)
    shares = {name: report[f"{name}_exact_match"].after for name in ("reliability", "generalization")}
    return {name: f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]" for name, share in shares.items()}


def as_base(model: PeftModel, tokenizer: Any, prompts: Sequence[str]) -> str | None:
    """Count the prompts that are answered token for token as by the base: 32 tokens, or up to EOS."""
    ids_of = encode_prompts(prompts, tokenizer)
    questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=ANSWER_TOKENS) for ids in ids_of]
    mine = generate_and_score(model, tokenizer, questions, progress=False)
    with model.disable_adapter():
        base = generate_and_score(model, tokenizer, questions, progress=False)
    same = sum(one.token_ids == other.token_ids for one, other in zip(mine, base, strict=True))
    return f"{same} of {len(prompts)}" if prompts else None


if __name__ == "__main__":
    main()
