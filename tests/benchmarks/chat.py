"""Edit a chat model in each form (plain text, the chat template, both) and ask it in every way that users ask.

Each cell trains some edits into SmolLM2-135M-Instruct by a recipe's defaults, and counts the right greedy answers:
raw, in chat, with a system prompt, as a second turn, and to the rephrasings. The last columns count questions about
the world (the locality probes of `examples/facts.jsonl`) that still have the right answer, out of those that the base
answers.

`--thinking` gives the tokenizer a template that begins answers with an empty block of thoughts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from peft import get_peft_model
from transformers import PrinterCallback

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    LocFTConfig,
    Message,
    Prompt,
    balanced_config,
    encode_prompts,
)
from peft_locft.data.edits import read_edits
from peft_locft.engine.decoding import generate_and_score
from peft_locft.engine.model_state import as_base
from peft_locft.engine.questions import Question
from peft_locft.evaluation.scoring import contains, cut_answer, exact_match
from peft_locft.training.config import Recipe

from .common import REPOSITORY, in_own_process, load, machine, markdown_table, write_json

FORMS = ("off", "on", "both")
SYSTEM = Message("system", "You are the assistant of a travel agency. Answer briefly.")
FIRST_TURN = (
    Message("user", "Can you give me a short tip for better sleep?"),
    Message("assistant", "Go to bed at the same time every day, and leave your phone in another room."),
)
NUM_WORLD = 30  # questions about the world
ANSWER_TOKENS = 16
# how a prompt is asked: the messages before it, `None` for plain text
WAYS: dict[str, tuple[Message, ...] | None] = {
    "raw": None,
    "chat": (),
    "system prompt": (SYSTEM,),
    "2nd turn": FIRST_TURN,
    "system, 2nd turn": (SYSTEM, *FIRST_TURN),
}
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--edits", type=Path, required=True, help="a file that read_edits reads")
    parser.add_argument("--num_edits", type=int, default=25, help="use only the first N edits")
    parser.add_argument(
        "--kind", choices=("questions", "statements", "all"), default="all", help="which edits to take"
    )
    parser.add_argument("--recipes", nargs="+", default=["published"], choices=get_args(Recipe), help="how to train")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS, help="how the edits are written")
    parser.add_argument("--thinking", action="store_true", help="use a template with an empty block of thoughts")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    names = ("edits", "num_edits", "kind", "thinking", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    print(f"{machine()}\n\n{arguments.edits.name}, {arguments.kind}\n", flush=True)
    cells: list[dict[str, Any]] = []
    for recipe in arguments.recipes:
        for form in arguments.forms:
            cells.append(in_own_process(measure, recipe=recipe, form=form, **settings))
            table = markdown_table(cells).splitlines()
            print("\n".join(table if len(cells) == 1 else table[-1:]), flush=True)
            write_json(
                arguments.output / "chat.json", {"machine": machine(), "settings": str(settings), "rows": cells}
            )


def measure(
    recipe: Recipe, form: str, edits: Path, num_edits: int, kind: str, thinking: bool, threads: int
) -> dict[str, Any]:
    """Train the edits in one form, in this process; return the number of right answers by the way of asking."""
    torch.set_num_threads(threads)
    model, tokenizer = load("bfloat16", chat_template=True)
    if thinking:
        tokenizer.chat_template = THINKING
    chosen = [edit for edit in read_edits(edits, on_conflict="last") if kind in ("all", kind_of(edit))][:num_edits]
    edited = get_peft_model(model, balanced_config(model) if recipe == "balanced" else LocFTConfig())
    args = BreadthFirstConfig(
        recipe=recipe, use_cpu=True, logging_strategy="no", disable_tqdm=True, report_to="none", chat_template=form
    )
    trainer = BreadthFirstTrainer(edited, args, train_dataset=chosen, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    begun = time.process_time()
    trainer.train()
    row = {
        "recipe": recipe,
        "trained": form,
        "edits": len(chosen),
        "epochs": len(trainer.epoch_losses),
        "CPU seconds": time.process_time() - begun,
    }
    for way, history in WAYS.items():
        row[way] = num_right(edited, tokenizer, ((edit.prompt, edit.target) for edit in chosen), history)
    if thinking:
        bare = [(edit.prompt, edit.target) for edit in chosen]
        row["chat, no block"] = num_right(edited, tokenizer, bare, (), before_block=True)
    rephrased = [(text, edit.target) for edit in chosen for text in edit.rephrasings]
    for way in ("raw", "chat"):
        row[f"rephrased, {way}"] = share(num_right(edited, tokenizer, rephrased, WAYS[way]), len(rephrased))
    return row | world(edited, tokenizer)


def kind_of(edit: Edit) -> str:
    return "questions" if edit.prompt.rstrip().endswith("?") else "statements"


def num_right(
    model: Any, tokenizer: Any, pairs: Iterable[tuple[str, str]], history: Any, before_block: bool = False
) -> int:
    """Return the number of prompts whose greedy answer, up to a full stop or line break, is the target."""
    asked = list(pairs)
    found = answers(model, tokenizer, [prompt for prompt, _ in asked], history, before_block)
    return sum(exact_match(answer, target) for answer, (_, target) in zip(found, asked, strict=True))


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], history: Any, before_block: bool = False) -> list[str]:
    rows = encode_prompts([Prompt(prompt, history) for prompt in prompts], tokenizer)
    if before_block:
        block = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False).input_ids
        assert all(row[-len(block) :] == block for row in rows)
        rows = [row[: -len(block)] for row in rows]
    replies = generate_and_score(
        model, tokenizer, [Question(tuple(row), max_new_tokens=ANSWER_TOKENS) for row in rows]
    )
    return [cut_answer(tokenizer.decode(each.token_ids, skip_special_tokens=True)).strip() for each in replies]


def world(model: Any, tokenizer: Any) -> dict[str, str]:
    """Return how many questions about the world are still answered, of those that the base answers."""
    facts = read_edits(REPOSITORY / "examples" / "facts.jsonl")
    known = list(dict.fromkeys((probe.prompt, probe.answer) for edit in facts for probe in edit.locality))[:NUM_WORLD]
    row = {}
    for way in ("raw", "chat"):
        prompts = [prompt for prompt, _ in known]
        with as_base(model):
            before = answers(model, tokenizer, prompts, WAYS[way])
        after = answers(model, tokenizer, prompts, WAYS[way])
        pairs = list(zip(before, after, known, strict=True))
        right = [now for was, now, (_, answer) in pairs if answer and contains(was, answer)]
        expected = [answer for was, _, (_, answer) in pairs if answer and contains(was, answer)]
        still = sum(contains(now, answer) for now, answer in zip(right, expected, strict=True))
        row[f"world, {way}"] = f"{still} of {len(right)}"
    return row


def share(count: int, total: int) -> str:
    return f"{count / total:.2f}" if total else "-"


if __name__ == "__main__":
    main()
