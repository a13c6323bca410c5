"""How often the base model finds the subject of an edit that names none, beside the data set's own subjects."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peft_locft import Edit, read_edits
from peft_locft.data.gradient_tokens import subject_spans
from peft_locft.data.subjects import find_subjects

from .common import load, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--edits", type=Path, nargs="+", required=True, help="files of edits with subjects")
    parser.add_argument("--num_edits", type=int, default=500, help="take so many of each file")
    parser.add_argument("--skip", type=int, default=0, help="pass over so many edits first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load("bfloat16")
    print(f"{machine()}\n")
    print("| edits | of | same last character | the same subject | processor seconds |\n|---|---|---|---|---|")
    for path in arguments.edits:
        edits = read_edits(path, on_conflict="last")[arguments.skip :]
        found = measured(model, tokenizer, edits[: arguments.num_edits])
        print(
            f"| {path.stem} | {found['num']} | {found['ends']:.3f} | {found['exact']:.3f} | {found['seconds']:.0f} |",
            flush=True,
        )


def measured(model: Any, tokenizer: Any, edits: Sequence[Edit]) -> dict[str, float]:
    """Return the shares of edits whose subject is found: with the right end, and whole.

    Raises:
        ValueError: if no edit has a subject in its prompt.
    """
    known = [edit for edit in edits if edit.subject and spans(edit, edit.subject)]
    if not known:
        raise ValueError(f"found no subject in the prompts of {len(edits)} edits; there is nothing to compare with")
    begun = time.process_time()
    found = find_subjects(model, tokenizer, [replace(edit, subject=None) for edit in known])
    seconds = time.process_time() - begun
    pairs = list(zip(known, found, strict=True))
    ends = [ends_of(edit, name) & ends_of(edit, edit.subject) for edit, name in pairs]
    return {
        "num": len(known),
        "ends": sum(map(bool, ends)) / len(known),
        "exact": sum(edit.subject == name for edit, name in pairs) / len(known),
        "seconds": seconds,
    }


def spans(edit: Edit, subject: str | None) -> list[tuple[int, int]]:
    return subject_spans(subject, edit.prompt, 0, len(edit.prompt))


def ends_of(edit: Edit, subject: str | None) -> set[int]:
    return {end for _, end in spans(edit, subject)}


if __name__ == "__main__":
    main()
