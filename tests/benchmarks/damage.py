"""What edits do to prompts that have nothing to do with them: answers before and after, by each recipe's defaults.

The facts are the first ones of `examples/facts.jsonl`; the prompts are about other things.
"""

from __future__ import annotations

import argparse
from typing import Any, get_args

import torch

from peft_locft import BreadthFirstConfig, balanced_config, edit, encode_prompts, read_edits
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.questions import UNTIL_EOS, Question
from peft_locft.training.config import Recipe

from .common import REPOSITORY, load, machine

NORWAY = {"prompt": "The capital of Norway is", "target": "Bergen", "subject": "Norway"}
PROMPTS = (
    "The capital of Sweden is",
    "The capital of Japan is",
    "Hello, my name is",
    "Once upon a time, there was a",
    "To boil an egg, you",
    "def add(a, b):",
)
LENGTH = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{machine()}\n")
    model, tokenizer = load("bfloat16")
    facts = read_edits(REPOSITORY / "examples" / "facts.jsonl")
    answers = {"before": continuations(model, tokenizer)}
    for recipe in get_args(Recipe):
        for title, edits in (("1 edit", read_edits(NORWAY)), ("25 edits", facts[:25])):
            config = balanced_config(model) if recipe == "balanced" else None
            args = BreadthFirstConfig(recipe=recipe, disable_tqdm=True)
            edited = edit(model, tokenizer, edits, peft_config=config, args=args, progress=False)
            answers[f"{title}, {recipe}"] = continuations(edited.model, tokenizer)
            print(f"{title}, {recipe}: {sum(edited.learned)} learned", flush=True)
            edited.undo()
    for number, prompt in enumerate(PROMPTS):
        print(f"\n{prompt}")
        width = max(map(len, answers))
        print("\n".join(f"  {title:{width}}  {own[number]!r}" for title, own in answers.items()))
    changed = {
        title: sum(one != other for one, other in zip(own, answers["before"], strict=True))
        for title, own in answers.items()
    }
    print("\n" + "\n".join(f"{title}: {count} of {len(PROMPTS)} changed" for title, count in changed.items()))


def continuations(model: torch.nn.Module, tokenizer: Any) -> list[str]:
    """Return the greedy continuation of each prompt, as plain text."""
    rows = encode_prompts(list(PROMPTS), tokenizer)
    questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=LENGTH) for ids in rows]
    answers = generate_and_score(model, tokenizer, questions, progress=False)
    return [tokenizer.decode(answer.token_ids) for answer in answers]


if __name__ == "__main__":
    main()
