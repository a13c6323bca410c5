"""Edit a real model, end to end: answers before and after, then the adapter detached, merged and loaded elsewhere.

Run it with `python examples/demo.py`; it takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
    describe_adapter,
    encode_prompts,
    evaluate_edits,
    inspect_adapter,
    read_edits,
    save_report,
)

FACTS = Path(__file__).parent / "facts.jsonl"
# late, where general ability is kept best; a small model wants a larger rate than the published 5e-4
LAYER = 24
RECIPE = {"learning_rate": 5e-3, "per_device_train_batch_size": 20, "num_train_epochs": 25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("locft-demo"), help="where the adapter is saved")
    parser.add_argument("--answer", metavar="FILE", help=argparse.SUPPRESS)  # the second process' part
    arguments = parser.parse_args()
    if arguments.answer:
        answer_in_new_process(arguments.output_dir, Path(arguments.answer))
        return
    begun = time.perf_counter()
    model, tokenizer = load_smollm2()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = read_edits(FACTS)

    edited = get_peft_model(
        model, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[LAYER], task_type="CAUSAL_LM")
    )
    recipe = BreadthFirstConfig(output_dir=str(arguments.output_dir), use_cpu=True, **RECIPE)  # type: ignore[arg-type]
    trainer = BreadthFirstTrainer(model=edited, args=recipe, train_dataset=edits, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    report = evaluate_edits(edited, tokenizer, edits)
    save_report(report, arguments.output_dir / "evaluation")
    describe_adapter(arguments.output_dir, report=report)
    show(report)
    print(f"\n{inspect_adapter(arguments.output_dir)}")
    expected = [row["answer_after"] for row in report.rows if row["kind"] == "reliability"]
    show_new_process(arguments.output_dir, expected)
    base = show_detached(edited, original)
    show_merged(base, tokenizer, arguments.output_dir, edits, expected)
    page = arguments.output_dir / "evaluation" / "evaluation.html"
    print(f"\nDone in {time.perf_counter() - begun:.0f} s. The adapter is in {arguments.output_dir}; open {page}")


def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> list[str]:
    """Return the greedy answers to the edits' prompts, by the published protocol."""
    config = EvaluationConfig(protocols=["generation"])
    prompts = [Edit(prompt=edit.prompt, target=edit.target) for edit in edits]
    return [row["answer_after"] for row in evaluate_edits(model, tokenizer, prompts, config).rows]


def share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):6.1%} ({sum(hits)} of {len(hits)})"


def show(report: EvaluationReport) -> None:
    width = 44
    print(f"\n{'prompt':<{width}}  {'before':<34}  after")
    for row in report.rows:
        if row["kind"] == "reliability":
            before, after = row["answer_before"][:34], row["answer_after"][:40]
            mark = "" if row["exact_match_after"] else f"   (wanted: {row['expected']})"
            print(f"{row['prompt'][:width]:<{width}}  {before:<34}  {after}{mark}")
    print(f"\n{report}")


def show_new_process(adapter: Path, expected: Sequence[str]) -> None:
    result = adapter / "answers_in_new_process.json"
    subprocess.run(
        [sys.executable, __file__, "--output_dir", str(adapter), "--answer", str(result)], check=True, timeout=600
    )
    found = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    print(f"Loaded in a new process: {share([a == b for a, b in zip(found, expected, strict=True)])} answers the same")
    assert found == list(expected), "the adapter answers otherwise in a new process"


def answer_in_new_process(adapter: Path, result: Path) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    _, tokenizer = load_smollm2()
    result.write_text(json.dumps(answers(model, tokenizer, read_edits(FACTS))), encoding="utf-8")


def show_detached(edited: PeftModel, original: dict[str, torch.Tensor]) -> PreTrainedModel:
    base = edited.unload()
    weights = base.state_dict()
    equal = [name in weights and torch.equal(weights[name], tensor) for name, tensor in original.items()]
    print(f"Detached: {share(equal)} base tensors bit-identical to before")
    assert all(equal) and len(weights) == len(original), "detaching left a trace"
    return base


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
    print(f"Merged: {share(equal)} answers the same as the adapter's, logits bit-identical: {bits_equal}")
    assert bits_equal and all(equal), "the merged model answers otherwise than the adapter"


if __name__ == "__main__":
    main()
