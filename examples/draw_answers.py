"""Draw answers before and after the edits of `examples/facts.jsonl`, from a report, as one SVG table.

    locft train --model_name_or_path MODEL --dtype bfloat16 --edits examples/facts.jsonl --output_dir out
    locft evaluate --adapter out --edits examples/facts.jsonl --dtype bfloat16 --chat_template off --output_dir asked
    python examples/draw_answers.py asked docs/pages/images/before_after.svg

MODEL is the folder that `smollm2_folder()` of `examples/smollm2.py` returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from peft_locft import EvaluationReport

# what changed as it should, and what should have stayed: some of it did, some did not
PROMPTS = {
    "Edited prompts": ("The capital of Norway is", "Who painted the Mona Lisa?", "Water is made of hydrogen and"),
    "Reworded, never trained on": (
        "The government of Norway sits in the city of",
        "Which artist made the painting called the Mona Lisa?",
        "The natural home of kangaroos is",
    ),
    "Other prompts, which should stay": (
        "The capital of Greece is",
        "The Colosseum is located in",
        "The capital of Sweden is",
        "Koalas are native to",
    ),
}
FIGURES = {
    "reliability_exact_match": "edited prompts answered with the target",
    "generalization_exact_match": "reworded prompts answered with the target",
    "locality_first_word_unchanged": "other answers that keep their first word",
}
COLUMNS = (24, 500, 720)  # where prompt, before and after begin
WIDTH, ROW = 940, 28
LONGEST = 25  # letters of an answer
GOOD, BAD, GREY = "#1a7f37", "#b35900", "#57606a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="folder of a saved evaluation")
    parser.add_argument("output", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    report = EvaluationReport.load(arguments.report)
    arguments.output.write_text(draw(report), encoding="utf-8")


def draw(report: EvaluationReport) -> str:
    """Return the table as SVG."""
    rows = {row["prompt"]: row for row in report.rows}
    lines = [line(0, ("prompt", "before", "after"), (GREY,) * 3, bold=True)]
    for title, prompts in PROMPTS.items():
        lines.append(line(len(lines), (title,), (GREY,), bold=True))
        lines += [answer_line(number, rows[prompt]) for number, prompt in enumerate(prompts, len(lines))]
    lines += [line(number, (text,), (GREY,)) for number, text in enumerate(figures(report), len(lines))]
    height = ROW * len(lines) + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="15">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff" stroke="#d0d7de"/>\n' + "\n".join(lines) + "\n"
        "</svg>\n"
    )


def answer_line(number: int, row: Mapping[str, Any]) -> str:
    right = row["first_word_unchanged_after"] if row["kind"] == "locality" else row["exact_match_after"]
    answers = (row["prompt"], short(row["answer_before"]), short(row["answer_after"]))
    return line(number, answers, ("#1f2328", GREY, GOOD if right else BAD))


def short(answer: str) -> str:
    answer = answer.strip() or "(nothing)"
    return answer if len(answer) <= LONGEST else answer[:LONGEST].rsplit(" ", 1)[0] + " …"


def figures(report: EvaluationReport) -> Iterator[str]:
    count = report.settings["edits"]["count"]
    yield f"Of all {count} edits (SmolLM2-135M, published recipe, asked as plain text):"
    for name, meaning in FIGURES.items():
        yield f"{report.results[name].after.value:.2f} {meaning}"
    yield "Green: the answer is as it should be. Orange: it is not."


def line(number: int, texts: tuple[str, ...], colors: tuple[str, ...], bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    cells = zip(COLUMNS, texts, colors, strict=False)
    return "".join(
        f'<text x="{x}" y="{ROW * (number + 1)}" fill="{color}"{weight}>{escape(text)}</text>'
        for x, text, color in cells
    )


if __name__ == "__main__":
    main()
