"""What the metrics are called, and what they tell somebody who does not know the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluation.metrics import LOWER_IS_BETTER
from ..evaluation.report import MetricResult


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that measure the same.

    Args:
        title: what it is called.
        question: what it answers.
        are_shares: its metrics are from 0 to 1, and more is better.
    """

    title: str
    question: str
    are_shares: bool = True


GROUPS = {
    "reliability": Group("Reliability", "Does the model answer the edited prompts as the edits say?"),
    "generalization": Group("Generalization", "Does it also, when the same is asked in other words?"),
    "locality": Group("Locality", "Are its answers to other questions left alone?"),
    "portability": Group("Portability", "Does it answer questions that follow from the edits?"),
    "edit_score": Group("Edit score", "How well does it do at the first three together?"),
    "general": Group("General ability", "Has the model as a whole been harmed?", are_shares=False),
    "other": Group("Other figures", "What else was measured.", are_shares=False),
}
GENERAL = ("perplexity", "kl_from_base", "fluency_n_gram_entropy")

LABELS = {
    "edit_score": "edit score",
    "fluency_n_gram_entropy": "fluency (n-gram entropy)",
    "kl_from_base": "KL from the base",
}
# by the whole name, or by what follows the group's
WORDS = {
    "exact_match": "Asked, the model says just the right answer.",
    "contains": "Asked, it says the right answer, perhaps with other words around it.",
    "token_accuracy": "How much of the right answer it would say, piece by piece, each time shown the pieces before.",
    "more_probable": "It finds the new answer likelier than the old one.",
    "locality_more_probable": "It finds the right answer likelier than what the edit says.",
    "unchanged": "It says just what it said before the edit, right or wrong.",
    "first_word_unchanged": "Its answer begins with the same word as before the edit.",
    "tokens_unchanged": "How many pieces of an answer it would choose as before the edit.",
    "edit_score": "High only if edits are learned, in other words too, and other answers are left alone.",
    "perplexity": "How much ordinary text surprises it: lower is better, and a rise is harm.",
    "kl_from_base": "How far it has moved from the base in guessing the next word of ordinary text: 0 is not at all.",
    "fluency_n_gram_entropy": "How varied the words of its longer texts are: a fall means that it repeats itself.",
}
# the first of these that was measured says the most about its group
HEADLINES = {
    "reliability": ("exact_match", "token_accuracy", "more_probable"),
    "generalization": ("exact_match", "token_accuracy", "more_probable"),
    "locality": ("unchanged", "tokens_unchanged", "exact_match", "token_accuracy", "more_probable"),
    "portability": ("exact_match", "token_accuracy"),
    "edit_score": ("edit_score",),
    "general": GENERAL,
}


def group_of(name: str) -> str:
    """Return the group of a metric, a key of `GROUPS`."""
    if name in GENERAL:
        return "general"
    if name in GROUPS:
        return name
    group, _, rest = name.partition("_")
    return group if rest and group in GROUPS and GROUPS[group].are_shares else "other"


def short_name(name: str) -> str:
    """Return the name without its group's."""
    return name.removeprefix(f"{group_of(name)}_")


def label_of(name: str) -> str:
    """Return a metric's name in words, without its group's."""
    return LABELS.get(name) or short_name(name).replace("_", " ")


def words_of(name: str) -> str | None:
    """Return in plain words what a metric tells; `None` for one that is not ours."""
    short = None if group_of(name) == "other" else WORDS.get(short_name(name))
    return WORDS.get(name, short)


def higher_is_better(name: str) -> bool | None:
    """Say whether more of it is better; `None` where that is not known."""
    if name in LOWER_IS_BETTER:
        return False
    return None if group_of(name) == "other" else True


def grouped(results: Mapping[str, MetricResult]) -> dict[str, dict[str, MetricResult]]:
    """Return the metrics by group, in the order of `GROUPS`; only groups that have some."""
    found = {key: {name: result for name, result in results.items() if group_of(name) == key} for key in GROUPS}
    return {key: members for key, members in found.items() if members}


def headline(key: str, members: Mapping[str, MetricResult]) -> str | None:
    """Return the name of the metric that says the most about a group; `None` if none of those was measured."""
    names = [f"{key}_{short}" for short in HEADLINES.get(key, ())] + list(HEADLINES.get(key, ()))
    return next((name for name in names if name in members), None)
