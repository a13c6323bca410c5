"""Time greedy answers: `evaluate_edits` against `model.generate` in the obvious padded loop, in one run.

The loop asks the same prompts (of every edit its prompt, rephrasings and locality probes) in batches, padded on the
left, 32 tokens each, and cuts the answers afterwards: once as it is, and once told to stop (`stop_strings`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_locft import EvaluationConfig, encode_prompts, evaluate_edits, read_edits
from peft_locft.evaluation.items import eval_items
from peft_locft.evaluation.scoring import cut_answer

from .common import in_own_process, load, machine, markdown_table, parser_for, write_json

VARIANTS = ("ours", "model.generate", "model.generate, stop_strings")


def main() -> None:
    parser = parser_for(__doc__, epochs=0, num_edits=3000)
    parser.add_argument("--batch_size", type=int, default=32, help="prompts in a batch of the loop")
    parser.add_argument("--adapter", type=Path, help="ask the model with this adapter; None: as it is")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="the first is compared with")
    arguments = parser.parse_args()
    variants = arguments.variants
    names = ("edits", "num_edits", "batch_size", "adapter", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    cells = [in_own_process(measure, variant=variant, **settings) for variant in variants]
    rows = [compared(variant, cell, cells[0]) for variant, cell in zip(variants, cells, strict=True)]
    print(f"{machine()}\n\n{markdown_table(rows)}")
    write_json(arguments.output / "answers.json", {"machine": machine(), "rows": rows})


def measure(
    variant: str, edits: Path, num_edits: int, batch_size: int, adapter: Path | None, threads: int
) -> dict[str, Any]:
    """Answer all prompts in this process; return the seconds and the answers."""
    torch.set_num_threads(threads)
    model, tokenizer = load("float32")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    read = read_edits(edits)[:num_edits]
    begun = time.perf_counter()
    if variant == "ours":
        report = evaluate_edits(model, tokenizer, read, EvaluationConfig(protocols=["generation"]), progress=True)
        answers = [row["answer_after"] for row in report.rows]
    else:
        stop = {"stop_strings": [".", "\n"], "tokenizer": tokenizer} if "stop" in variant else {}
        answers = looped(model, tokenizer, [item.prompt for item in eval_items(read)], batch_size, stop)
    return {"seconds": time.perf_counter() - begun, "answers": answers}


@torch.no_grad()
def looped(model: Any, tokenizer: Any, prompts: Sequence[str], batch_size: int, stop: dict[str, Any]) -> list[str]:
    answers: list[str] = []
    for begin in range(0, len(prompts), batch_size):
        rows = encode_prompts(prompts[begin : begin + batch_size], tokenizer)
        width = max(map(len, rows))
        padded = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        generated = model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **stop,
        )
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        answers += [cut_answer(text).strip() for text in texts]
    return answers


def compared(variant: str, cell: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    if "error" in cell or "error" in ours:
        return {"variant": variant, "prompts": None, "seconds": None, "times ours": None, "same answers, %": None}
    same = sum(one == other for one, other in zip(cell["answers"], ours["answers"], strict=True))
    return {
        "variant": variant,
        "prompts": len(cell["answers"]),
        "seconds": cell["seconds"],
        "times ours": cell["seconds"] / ours["seconds"],
        "same answers, %": 100 * same / len(cell["answers"]),
    }


if __name__ == "__main__":
    main()
