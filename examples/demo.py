"""Edit a real model with plain defaults, by both recipes, and say in sentences what was learned and what it cost.

Run it with `python examples/demo.py`; it takes two to three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from smollm2 import load_smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EvaluationConfig,
    EvaluationReport,
    LocFTConfig,
    balanced_config,
    describe_adapter,
    encode_prompts,
    evaluate_edits,
    read_edits,
    save_report,
)
from peft_locft.evaluation import EditEvaluator

FACTS = Path(__file__).parent / "facts.jsonl"
EVERY = 4  # facts: all 78 take five minutes
NUM_SHOWN = 3
EVALUATION = EvaluationConfig(protocols=["generation"], max_new_tokens=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("locft-demo"), help="where the adapters are saved")
    parser.add_argument("--answer", metavar="FILE", help=argparse.SUPPRESS)  # the second process' part
    arguments = parser.parse_args()
    if arguments.answer:
        answer_in_new_process(arguments.output_dir, Path(arguments.answer))
        return
    begun = time.perf_counter()
    model, tokenizer = load_smollm2(dtype=torch.bfloat16)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = facts()
    evaluator = None
    for recipe in ("published", "balanced"):
        folder = arguments.output_dir / recipe
        begun_recipe = time.perf_counter()
        edited, trainer = train(model, tokenizer, edits, recipe, folder)
        print(f"\n{recipe.capitalize()} recipe, in {time.perf_counter() - begun_recipe:.0f} s: {trainer.learned}.")
        # one evaluator: the base answers only once
        evaluator = evaluator or EditEvaluator(edited, tokenizer, edits, EVALUATION)
        report = evaluator.evaluate(edited)
        save_report(report, folder / "evaluation")
        describe_adapter(folder, report=report)
        show(report, recipe)
        model = detach(edited, original)
    expected = [row["answer_after"] for row in report.rows if row["kind"] == "reliability" and not row["in_chat"]]
    print(f"\nThe adapter in {folder}:")
    show_new_process(folder, expected)
    show_merged(model, tokenizer, folder, edits, expected)
    page = arguments.output_dir / "published" / "evaluation" / "evaluation.html"
    print(f"\nDone in {time.perf_counter() - begun:.0f} s. Open {page}, and that of balanced.")


def facts() -> list[Edit]:
    return read_edits(FACTS)[::EVERY]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    recipe: Literal["published", "balanced"],
    folder: Path,
) -> tuple[PeftModel, BreadthFirstTrainer]:
    """Train and save by the defaults of a recipe."""
    config = balanced_config(model) if recipe == "balanced" else LocFTConfig()
    config.task_type = "CAUSAL_LM"
    edited = get_peft_model(model, config)
    args = BreadthFirstConfig(output_dir=str(folder), recipe=recipe)
    trainer = BreadthFirstTrainer(model=edited, args=args, train_dataset=edits, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return edited, trainer


def detach(edited: PeftModel, original: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Take the adapter off and compare every base tensor with what it was."""
    base: PreTrainedModel = edited.unload()
    weights = base.state_dict()
    equal = [name in weights and torch.equal(weights[name], tensor) for name, tensor in original.items()]
    print(f"Detached again: {share(equal)} base tensors are bit-identical to before.")
    assert all(equal) and len(weights) == len(original), "detaching left a trace"
    return base


def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> list[str]:
    """Return the greedy answers to the edits' prompts as plain text, by the published protocol."""
    config = replace(EVALUATION, chat_template="off")
    prompts = [Edit(prompt=edit.prompt, target=edit.target) for edit in edits]
    return [row["answer_after"] for row in evaluate_edits(model, tokenizer, prompts, config).rows]


def share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)} of {len(hits)}"


def show(report: EvaluationReport, recipe: str) -> None:
    def rows_of(kind: str, in_chat: bool) -> list[dict[str, Any]]:
        return [row for row in report.rows if row["kind"] == kind and row["in_chat"] == in_chat]

    for in_chat, where in ((False, "As plain text"), (True, "In chat")):
        asked, reworded, others = (rows_of(kind, in_chat) for kind in ("reliability", "generalization", "locality"))
        print(
            f"{where}: {share([bool(row['exact_match_after']) for row in asked])} edits are answered with the target, "
            f"{share([bool(row['exact_match_after']) for row in reworded])} asked in other words; "
            f"{share([not row['first_word_unchanged_after'] for row in others])} other answers changed."
        )
    reworded = [row for row in rows_of("generalization", False) if row["exact_match_after"]]
    damaged = [row for row in rows_of("locality", False) if not row["first_word_unchanged_after"]]
    for title, rows in (("Asked in other words", reworded), (f"Damaged by the {recipe} recipe", damaged)):
        print(f"  {title}:")
        # a damaged answer may be half a character, which says nothing to a reader
        legible = [row for row in rows if "\ufffd" not in row["answer_after"]]
        for row in legible[:NUM_SHOWN]:
            before, after = (" ".join(row[name].split())[:36] for name in ("answer_before", "answer_after"))
            print(f"    {row['prompt'][:58]:58}  {before!r} → {after!r}")


def show_new_process(adapter: Path, expected: Sequence[str]) -> None:
    result = adapter / "answers_in_new_process.json"
    subprocess.run(
        [sys.executable, __file__, "--output_dir", str(adapter), "--answer", str(result)], check=True, timeout=600
    )
    found = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    print(
        f"  loaded in a new process: {share([a == b for a, b in zip(found, expected, strict=True)])} answers the same"
    )
    assert found == list(expected), "the adapter answers otherwise in a new process"


def answer_in_new_process(adapter: Path, result: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16)
    _, tokenizer = load_smollm2()
    result.write_text(json.dumps(answers(model, tokenizer, facts())), encoding="utf-8")


def show_merged(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path,
    edits: Sequence[Edit],
    expected: Sequence[str],
) -> None:
    edited = PeftModel.from_pretrained(base, str(adapter))
    probe = torch.tensor([encode_prompts([edits[0].prompt], tokenizer)[0]])
    with torch.no_grad():
        unmerged_logits = edited(probe).logits
        merged = edited.merge_and_unload()
        bits_equal = torch.equal(merged(probe).logits, unmerged_logits)
    equal = [a == b for a, b in zip(answers(merged, tokenizer, edits), expected, strict=True)]
    print(f"  merged: {share(equal)} answers the same as the adapter's, logits bit-identical: {bits_equal}")
    assert bits_equal and all(equal), "the merged model answers otherwise than the adapter"


if __name__ == "__main__":
    main()
