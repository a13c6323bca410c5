"""What a scope changes inside a model: base bits outside of it, the edits inside, and the time of a forward."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel

from peft_locft import Edit, read_edits
from peft_locft.adapters import Scope, apply_scope

from .common import REPOSITORY, machine, markdown_table, write_json

FACTS = REPOSITORY / "examples" / "facts.jsonl"
BATCH = 20
NUM_TOKENS = 32
NUM_ANSWER_TOKENS = 8
SETTINGS: dict[str, dict[str, Any] | None] = {
    "scope": {},
    "scope, from the name on": {"whole_prompt": False},
    "no scope": None,
}


def main() -> None:
    from smollm2 import load_smollm2

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="a LocFT adapter of SmolLM2-135M")
    parser.add_argument("--edits", type=Path, default=FACTS, help="what it was taught, with subjects")
    parser.add_argument("--probes", type=Path, required=True, help="edits whose locality prompts are asked")
    parser.add_argument("--num_probes", type=int, default=200, help="so many, none with a subject of the edits")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"), help="folder of what is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = load_smollm2(dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    model = PeftModel.from_pretrained(base, str(arguments.adapter)).eval()
    edits = read_edits(arguments.edits)
    scope = Scope.of(edits)
    outside = [probe.prompt for edit in read_edits(arguments.probes, on_conflict="last") for probe in edit.locality]
    outside = [text for text in dict.fromkeys(outside) if not scope.matches(text)]
    asked = Asked(model, tokenizer, edits, scope, outside, arguments.num_probes)
    print(f"{machine()}\n\n{len(edits)} edits, {len(asked.outside)} probes outside\n", flush=True)
    rows = []
    for name, how in SETTINGS.items():
        if how is None:
            rows.append({"setting": name} | asked.measured())
        else:
            with apply_scope(model, tokenizer, scope, **how):
                rows.append({"setting": name} | asked.measured())
        print("\n".join(markdown_table(rows).splitlines()[0 if len(rows) == 1 else -1 :]), flush=True)
    times = asked.times(scope)
    print(f"\n{markdown_table(times)}", flush=True)
    write_json(arguments.output / "scope.json", {"machine": machine(), "rows": rows, "times": times})


class Asked:
    """What is asked of a model: its edits, and prompts outside of them, with the base's answers.

    Where the base itself comes to name a subject, its answer is not outside.
    """

    def __init__(
        self, model: Any, tokenizer: Any, edits: Sequence[Edit], scope: Scope, outside: Sequence[str], num: int
    ) -> None:
        self.model, self.tokenizer, self.edits, self.scope = model, tokenizer, edits, scope
        self.outside: list[str] = []
        self.alone: list[tuple[Any, Any]] = []
        with model.disable_adapter():
            for prompt in outside:
                if len(self.outside) == num:
                    break
                answer = self.answers([prompt], 1)
                if not scope.matches(prompt + tokenizer.decode(answer[0][1])):
                    self.outside.append(prompt)
                    self.alone += answer
            self.batched = self.answers(self.outside, BATCH)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], size: int, length: int = NUM_TOKENS) -> list[tuple[Any, Any]]:
        """Return for each prompt the logits of its last token, and the tokens of its greedy answer."""
        found: list[tuple[Any, Any]] = []
        for begin in range(0, len(prompts), size):
            inputs = self.tokenizer(list(prompts[begin : begin + size]), return_tensors="pt", padding=True)
            logits = self.model(**inputs).logits[:, -1]
            tokens = self.model.generate(**inputs, max_new_tokens=length, do_sample=False)
            found += zip(logits, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
        return found

    def measured(self) -> dict[str, Any]:
        """Return how many answers outside are the base's, and how many edits are answered."""
        alone = self.same(self.answers(self.outside, 1), self.alone)
        batched = self.same(self.answers(self.outside, BATCH), self.batched)
        rephrased = [(edit.rephrasings[0], edit.target) for edit in self.edits if edit.rephrasings]
        return {
            "base's bits, one by one": alone,
            f"base's bits, batches of {BATCH}": batched,
            "edits": self.answered([(edit.prompt, edit.target) for edit in self.edits]),
            "in other words": self.answered(rephrased),
        }

    def same(self, found: Sequence[tuple[Any, Any]], expected: Sequence[tuple[Any, Any]]) -> str:
        """Return how many logits and answers are equal in every bit, where the base's answer names no subject."""
        pairs = [
            (own, base)
            for prompt, own, base in zip(self.outside, found, expected, strict=True)
            if not self.scope.matches(prompt + self.tokenizer.decode(base[1]))
        ]
        equal = sum(torch.equal(own[0], base[0]) and own[1] == base[1] for own, base in pairs)
        return f"{equal} of {len(pairs)}"

    def answered(self, pairs: Sequence[tuple[str, str]]) -> str:
        answers = self.answers([prompt for prompt, _ in pairs], BATCH, NUM_ANSWER_TOKENS)
        texts = self.tokenizer.batch_decode([tokens for _, tokens in answers])
        right = sum(text.strip().startswith(target) for text, (_, target) in zip(texts, pairs, strict=True))
        return f"{right} of {len(pairs)}"

    def times(self, scope: Scope, repeats: int = 41) -> list[dict[str, Any]]:
        """Return medians of the milliseconds of a forward and of an answer, all ways in turn."""
        inside, outside = self.edits[0].prompt, self.outside[0]
        rows = []
        for name, prompt in (("outside", outside), ("inside", inside)):
            ids = self.tokenizer(prompt, return_tensors="pt")
            run = partial(self.model, **ids)
            taken: dict[str, list[float]] = {"base": [], "no scope": [], "scope": []}
            for _ in range(repeats):
                with self.model.disable_adapter():
                    taken["base"].append(milliseconds(run))
                taken["no scope"].append(milliseconds(run))
                with apply_scope(self.model, self.tokenizer, scope):
                    taken["scope"].append(milliseconds(run))
            tokens = ids["input_ids"].shape[1]
            shown = {way: round(median(each), 1) for way, each in taken.items()}
            rows.append({"prompt": f"{name}, {tokens} tokens"} | {f"{way}, ms": each for way, each in shown.items()})
        return rows


@torch.no_grad()
def milliseconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
