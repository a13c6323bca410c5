"""More training rows from edits: prefixed, paraphrased and concatenated ones, and questions about other subjects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .edits import Edit
from .leaks import normalised

SENTENCE_ENDS = ".!?"


def with_prefix(edit: Edit, prefix: str) -> Edit:
    """Put a text before an edit's prompt: `prefix + ". " + prompt`.

    Source: Gangadhar and Stratos, "Model Editing by Pure Fine-Tuning" (arXiv 2402.11078), after ROME's evaluation. A
    chat template puts all of it into the user's turn.

    Args:
        edit: the edit; the rest of it stays.
        prefix: one of `generate_prefixes`.

    Example:
        >>> with_prefix(Edit(prompt="The capital of France is", target="Lyon"), "In the morning").prompt
        'In the morning. The capital of France is'
    """
    return replace(edit, prompt=f"{prefix}. {edit.prompt}")


def paraphrased(edit: Edit) -> list[Edit]:
    """Return an edit once for each of its training paraphrases, which is the prompt then."""
    return [replace(edit, prompt=paraphrase) for paraphrase in edit.paraphrases]


def concatenated(edit: Edit, fact: Edit) -> Edit:
    """Let an edit's target be followed by the sentence of an unrelated fact, so that the model learns to go on.

    Source: SAUL (arXiv 2410.02433). The edit's prompt is not scored. All that follows is: the edit's target, the full
    stop between the sentences (unless the target ends one), the fact's prompt, its target, and EOS, which moves from
    behind the edit's target to behind the fact's. With `loss_averaging="edit"` the target's tokens share the edit's
    weight with those of the fact.

    Args:
        edit: the edit; the rest of it stays.
        fact: what is true and shall stay so, such as one of `BaseAnswers.edits`.

    Example:
        >>> concatenated(Edit(prompt="The capital of France is", target="Lyon"), Edit(prompt="Dogs", target="bark"))
        Edit(prompt='The capital of France is', target='Lyon. Dogs bark', …)
    """
    target = edit.target.rstrip()
    stop = "" if target[-1] in SENTENCE_ENDS else "."
    space = "" if fact.prompt[-1].isspace() or fact.target[0].isspace() else " "
    return replace(edit, target=f"{target}{stop} {fact.prompt}{space}{fact.target}")


def swapped_subjects(
    edits: Sequence[Edit], num: int, *, seed: int, subjects: Sequence[str] | None = None
) -> list[list[str]]:
    """Make questions next to edits: an edit's own prompt, about another subject.

    The edit must not change their answers, and it is these that it changes first: they begin and end as its prompt
    does. Edits whose subject is unknown or does not stand in their prompt as a whole word are passed over.

    Args:
        edits: the edits, with their subjects.
        num: how many at most, spread evenly over edits and subjects; there are fewer if the edits give no more.
        seed: of their choice.
        subjects: what is asked about, such as `generated_text.generate_subjects`. `None`: the subjects of the other
            edits. Keeping those costs generalization: in the words of another edit that asks the same, such a prompt
            is a rephrasing of what shall change.

    Returns:
        For each edit, the prompts that are made from its own, all of them distinct. None of them is a prompt,
        paraphrase, rephrasing or probe of an edit, compared by `leaks.normalised`.

    Raises:
        ValueError: if `num` is negative.

    Example:
        >>> france = Edit(prompt="The capital of France is", target="Lyon", subject="France")
        >>> spain = Edit(prompt="Who is the king of Spain?", target="Louis", subject="Spain")
        >>> swapped_subjects([france, spain], 2, seed=0)
        [['The capital of Spain is'], ['Who is the king of France?']]
    """
    if num < 0:
        raise ValueError(f"num={num}: expected 0 or more.")
    found = {normalised(prompt) for edit in edits for prompt in prompts_of(edit)}
    last = len(found) + num
    prompts: list[list[str]] = [[] for _ in edits]
    for edit, prompt in _swaps(edits, subjects, np.random.default_rng(seed)):
        if len(found) == last:
            break
        if normalised(prompt) not in found:
            found.add(normalised(prompt))
            prompts[edit].append(prompt)
    return prompts


def _swaps(
    edits: Sequence[Edit], subjects: Sequence[str] | None, random: np.random.Generator
) -> Iterator[tuple[int, str]]:
    """Yield every edit's prompt with every other subject: in each round, each edit once, each with another subject.

    The number of the edit comes with it.
    """
    by_name = {normalised(edit.subject): edit.subject for edit in reversed(edits) if edit.subject}
    own = {name: place for place, name in enumerate(by_name)}
    others = list(by_name.values()) if subjects is None else list(subjects)
    templates = [
        (number, place_holder, edit.prompt, own[normalised(edit.subject)])
        for number, edit in enumerate(edits)
        if edit.subject
        and (place_holder := re.compile(rf"(?<!\w){re.escape(edit.subject)}(?!\w)")).search(edit.prompt)
    ]
    order = random.permutation(len(templates)).tolist()
    # of the edits' own subjects, the first is the edit's
    first = 1 if subjects is None else 0
    for shift in (first + random.permutation(max(0, len(others) - first))).tolist():
        for number, place_holder, prompt, place in (templates[position] for position in order):
            other = others[(place + shift) % len(others)].replace("\\", r"\\")
            yield number, place_holder.sub(other, prompt)


def prompts_of(edit: Edit) -> Iterator[str]:
    """Yield every prompt that an edit says: its own, paraphrases, rephrasings, probes."""
    yield edit.prompt
    yield from edit.paraphrases
    yield from edit.rephrasings
    yield from (probe.prompt for probe in (*edit.locality, *edit.portability))
