"""Edit a real model, end to end: answers before and after, then the adapter detached, merged and loaded elsewhere.

Run it with `python examples/demo.py`; it takes a few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from smollm2 import load_smollm2
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    LocFTConfig,
    encode_prompts,
    inspect_adapter,
    read_edits,
)

FACTS = Path(__file__).parent / "facts.jsonl"
# late, where general ability is kept best; a small model wants a larger rate than the published 5e-4
LAYER = 24
RECIPE = {"learning_rate": 5e-3, "per_device_train_batch_size": 20, "num_train_epochs": 25}
# a right answer is shorter by far, so that no share depends on it
MAX_NEW_TOKENS = 16


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
    before = ask(model, tokenizer, edits)

    edited = get_peft_model(
        model, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[LAYER], task_type="CAUSAL_LM")
    )
    recipe = BreadthFirstConfig(output_dir=str(arguments.output_dir), use_cpu=True, **RECIPE)  # type: ignore[arg-type]
    trainer = BreadthFirstTrainer(model=edited, args=recipe, train_dataset=edits, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    after = ask(edited, tokenizer, edits)

    show(edits, before, after)
    print(f"\n{inspect_adapter(arguments.output_dir)}")
    show_new_process(arguments.output_dir, edits, after["prompt"])
    base = show_detached(edited, original)
    show_merged(base, tokenizer, arguments.output_dir, edits, after)
    print(f"\nDone in {time.perf_counter() - begun:.0f} s. The adapter is in {arguments.output_dir}")


def questions(edits: Sequence[Edit]) -> dict[str, list[str]]:
    """Return the prompts of every kind, one an edit."""
    return {
        "prompt": [edit.prompt for edit in edits],
        "rephrasing": [edit.rephrasings[0] for edit in edits],
        "locality": [edit.locality[0].prompt for edit in edits],
    }


def ask(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit]) -> dict[str, list[str]]:
    return {kind: answers(model, tokenizer, prompts) for kind, prompts in questions(edits).items()}


class AtFullStop(StoppingCriteria):
    """Ends a row with the first token that holds a full stop or a line break."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.ends = torch.tensor(["." in text or "\n" in text for text in texts])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return self.ends[input_ids[:, -1]]


@torch.no_grad()
def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Return greedy answers, by the published protocol: cut at the first full stop, line break or EOS."""
    model.eval()
    encoded = encode_prompts(prompts, tokenizer)
    length = max(len(ids) for ids in encoded)
    # padded on the left, where generation needs it
    input_ids = torch.tensor([[tokenizer.eos_token_id] * (length - len(ids)) + ids for ids in encoded])
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded])
    generated = model.generate(  # type: ignore[operator]
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        stopping_criteria=[AtFullStop(tokenizer)],
    )
    texts = tokenizer.batch_decode(generated[:, length:], skip_special_tokens=True)
    return [text.lstrip().split(".")[0].split("\n")[0].strip() for text in texts]


def same(answer: str, expected: str) -> bool:
    """Compare as SQuAD does: lower case, no punctuation, no articles, single spaces."""

    def normalise(text: str) -> list[str]:
        words = "".join(letter for letter in text.lower() if letter not in string.punctuation).split()
        return [word for word in words if word not in ("a", "an", "the")]

    return normalise(answer) == normalise(expected)


def share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):6.1%} ({sum(hits)} of {len(hits)})"


def show(edits: Sequence[Edit], before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
    width = 44
    print(f"\n{'prompt':<{width}}  {'before':<34}  after")
    for edit, old, new in zip(edits, before["prompt"], after["prompt"], strict=True):
        mark = "" if same(new, edit.target) else f"   (wanted: {edit.target})"
        print(f"{edit.prompt[:width]:<{width}}  {old[:34]:<34}  {new[:40]}{mark}")
    targets = [edit.target for edit in edits]
    print(f"\n{'':<16}{'before':<22}after")
    for name, kind in (("reliability", "prompt"), ("generalization", "rephrasing")):
        hits = [[same(a, t) for a, t in zip(asked[kind], targets, strict=True)] for asked in (before, after)]
        print(f"{name:<16}{share(hits[0]):<22}{share(hits[1])}")
    kept = [same(new, old) for new, old in zip(after["locality"], before["locality"], strict=True)]
    first = [
        new.split()[:1] == old.split()[:1] for new, old in zip(after["locality"], before["locality"], strict=True)
    ]
    print(f"{'locality':<16}{'':<22}{share(kept)} whole answer unchanged, {share(first)} its first word")


def show_new_process(adapter: Path, edits: Sequence[Edit], expected: Sequence[str]) -> None:
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
    prompts = questions(read_edits(FACTS))["prompt"]
    result.write_text(json.dumps(answers(model, tokenizer, prompts)), encoding="utf-8")


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
    after: dict[str, list[str]],
) -> None:
    edited = PeftModel.from_pretrained(base, str(adapter))
    probe = torch.tensor([encode_prompts([edits[0].prompt], tokenizer)[0]])
    with torch.no_grad():
        unmerged_logits = edited(probe).logits
        merged = edited.merge_and_unload()
        bits_equal = torch.equal(merged(probe).logits, unmerged_logits)
    found = answers(merged, tokenizer, questions(edits)["prompt"])
    equal = [a == b for a, b in zip(found, after["prompt"], strict=True)]
    print(f"Merged: {share(equal)} answers the same as the adapter's, logits bit-identical: {bits_equal}")
    assert bits_equal and all(equal), "the merged model answers otherwise than the adapter"


if __name__ == "__main__":
    main()
