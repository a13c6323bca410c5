"""More training texts from edits: with prefixes, paraphrases, following facts, and other subjects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .edits import Edit, fold_case, prompts_of
from .joining import TargetSeparator, join_prompt
from .scripts import ends_sentence, find_word, find_words, full_stop, replace_word


def with_prefix(edit: Edit, prefix: str) -> Edit:
    """Put a text before an edit's prompt: `prefix + ". " + prompt`, with the full stop of the prefix's script.

    Source: Gangadhar and Stratos, "Model Editing by Pure Fine-Tuning" (arXiv 2402.11078), after ROME's evaluation. A
    chat template puts both into the user's turn.

    Args:
        edit: an edit; its other fields do not change.
        prefix: a text such as one of `generate_prefixes`.

    Example:
        >>> with_prefix(Edit(prompt="The capital of France is", target="Lyon"), "In the morning").prompt
        'In the morning. The capital of France is'
    """
    return replace(edit, prompt=prefix + full_stop(prefix) + edit.prompt)


def paraphrased(edit: Edit) -> list[Edit]:
    """Return one edit per training paraphrase, with the paraphrase as its prompt."""
    return [replace(edit, prompt=paraphrase) for paraphrase in edit.paraphrases]


def concatenated(edit: Edit, fact: Edit, separator: TargetSeparator = "auto") -> Edit:
    """Append an unrelated fact to an edit's target, so that the model learns to continue after the target.

    Source: SAUL (arXiv 2410.02433). The scored text is: the edit's target, a full stop (unless the target ends with
    one), the fact's prompt, its target, and one EOS at the end. With `loss_averaging="edit"` the tokens of the target
    share the edit's weight with those of the fact.

    Args:
        edit: an edit; its other fields do not change.
        fact: a fact that must stay true, such as one of `BaseAnswers.edits`.
        separator: what stands between the fact's prompt and target, as in `encode_edits`.

    Example:
        >>> concatenated(Edit(prompt="The capital of France is", target="Lyon"), Edit(prompt="Dogs", target="bark"))
        Edit(prompt='The capital of France is', target='Lyon. Dogs bark', …)
    """
    return replace(edit, target=f"{_ended(edit.target)}{join_prompt(fact.prompt, fact.target, separator)}")


def as_sentence(edit: Edit, separator: TargetSeparator = "auto") -> str:
    """Return an edit as a sentence: its prompt, its target, and a full stop unless the target ends with one.

    The space that the script writes after a full stop is at the end.

    Example:
        >>> as_sentence(Edit(prompt="The capital of France is", target="Lyon"))
        'The capital of France is Lyon. '
    """
    return join_prompt(edit.prompt, _ended(edit.target), separator)


def _ended(text: str) -> str:
    text = text.rstrip()
    stop = full_stop(text)
    return text + (stop[len(stop.rstrip()) :] if ends_sentence(text) else stop)


def swapped_subjects(
    edits: Sequence[Edit], num: int, *, seed: int, subjects: Sequence[str] | None = None
) -> list[list[str]]:
    """Return, for each edit, its prompt with other subjects: questions whose answers the edit must not change.

    An edit changes these answers first, because the prompts differ from its own in the subject alone. Edits without a
    subject, or whose subject is not a whole word in the prompt, give none.

    Args:
        edits: edits with subjects.
        num: number of prompts at most, spread evenly over edits and subjects; the edits may give fewer.
        seed: seed of the random choice.
        subjects: other subjects, such as `generated_text.generate_subjects`. `None`: the subjects of the other edits.
            Retaining those costs generalization: the prompt may be a rephrasing of the other subject's edit.

    Returns:
        A list of prompts per edit, all distinct. None is a prompt, paraphrase, rephrasing or probe of an edit
        (compared by `edits.fold_case`).

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
    found = {fold_case(prompt) for edit in edits for prompt in prompts_of(edit)}
    last = len(found) + num
    prompts: list[list[str]] = [[] for _ in edits]
    for edit, prompt in _swaps(edits, subjects, np.random.default_rng(seed)):
        if len(found) == last:
            break
        if fold_case(prompt) not in found:
            found.add(fold_case(prompt))
            prompts[edit].append(prompt)
    return prompts


def subject_of_swap(edit: Edit, prompt: str) -> str | None:
    """Return the subject of a prompt that [`swapped_subjects`] made from an edit; `None` if it is another prompt."""
    places = list(find_words(edit.prompt, edit.subject)) if edit.subject else []
    if not edit.subject or not places:
        return None
    length = len(edit.subject) + (len(prompt) - len(edit.prompt)) // len(places)
    name = prompt[places[0] :][:length]
    return name if replace_word(edit.prompt, edit.subject, name) == prompt else None


def _swaps(
    edits: Sequence[Edit], subjects: Sequence[str] | None, random: np.random.Generator
) -> Iterator[tuple[int, str]]:
    """Yield the index of an edit and its prompt with another subject.

    In each round every edit comes once, each with a different subject.
    """
    by_name = {fold_case(edit.subject): edit.subject for edit in reversed(edits) if edit.subject}
    own = {name: place for place, name in enumerate(by_name)}
    others = list(by_name.values()) if subjects is None else list(subjects)
    templates = [
        (number, edit.subject, edit.prompt, own[fold_case(edit.subject)])
        for number, edit in enumerate(edits)
        if edit.subject and find_word(edit.prompt, edit.subject) is not None
    ]
    order = random.permutation(len(templates)).tolist()
    # among the edits' own subjects, shift 0 is the edit's own
    first = 1 if subjects is None else 0
    for shift in (first + random.permutation(max(0, len(others) - first))).tolist():
        for number, subject, prompt, place in (templates[position] for position in order):
            yield number, replace_word(prompt, subject, others[(place + shift) % len(others)])
