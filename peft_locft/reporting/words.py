"""The metrics in words for readers who do not know the field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..evaluation.kinds import ALL_KINDS
from ..evaluation.metric_result import MetricResult
from ..evaluation.metrics import LOWER_IS_BETTER


@dataclass(frozen=True, slots=True)
class Group:
    """Metrics that answer the same question.

    Args:
        title: the group's name.
        question: what its metrics answer.
        are_shares: its metrics are from 0 to 1, and higher is better.
    """

    title: str
    question: str
    are_shares: bool = True


GROUPS = {
    "reliability": Group("Reliability", "Does the model answer the edited prompts as the edits say?"),
    "generalization": Group("Generalization", "Does it also give the new answer when the question is reworded?"),
    "locality": Group("Locality", "Does it still answer other questions as before?"),
    "portability": Group("Portability", "Does it answer questions that follow from the edits?"),
    "cross_lingual": Group("Asked in another language", "Does it give the new answer in another language, too?"),
    "belief": Group("Belief", "Does the model hold the new answer to be true, however it is asked?"),
    "long_answer": Group("Long answers", "How much of a long answer does it give?"),
    "edit_score": Group("Edit score", "How good are reliability, generalization and locality together?"),
    "general": Group("General ability", "Did the edits harm the model as a whole?", are_shares=False),
    "other": Group("Other metrics", "What else was measured.", are_shares=False),
}
GENERAL = ("perplexity", "kl_from_base", "fluency_n_gram_entropy")

LABELS = {
    "edit_score": "edit score",
    "fluency_n_gram_entropy": "fluency (n-gram entropy)",
    "kl_from_base": "KL from the base",
}
# by the full name, or by the name without its group
WORDS = {
    "exact_match": "The answer is exactly the right one.",
    "contains": "The answer contains the right one, perhaps among other words.",
    "token_accuracy": "Share of the right answer's tokens (words or parts of words) that the model predicts.",
    "judged": "A language model that compares it with the right answers says that the answer is right.",
    "more_probable": "The model finds the new answer more probable than the old one.",
    "locality_more_probable": "The model finds the right answer more probable than the answer of the edit.",
    "unchanged": "The answer is the same as before the edit, right or wrong.",
    "first_word_unchanged": "The answer begins with the same word as before the edit.",
    "tokens_unchanged": "Share of an answer's tokens (words or parts of words) predicted as before the edit.",
    "chosen": "Of the choices, the answer names the right one first.",
    "most_probable": "Of the choices, the model finds the right one the most probable.",
    "says_target": "The answer contains the new answer of the edit, which it should not. Lower is better.",
    "rouge_l": "How many words it shares with the right answer, in the same order.",
    "embedding_similarity": "How close it is in meaning to the right answer.",
    "edit_score": "High only if the edits are learned, hold in other words, and leave other answers unchanged.",
    "perplexity": "How badly the model predicts ordinary text. Lower is better; a rise means harm.",
    "kl_from_base": "How far its predictions on ordinary text have moved from the base model's. 0 means not at all.",
    "fluency_n_gram_entropy": "How varied the model's longer answers are. A fall means that it repeats itself.",
}
# the first of these that was measured represents its group
HEADLINES = {
    "reliability": ("exact_match", "token_accuracy", "more_probable"),
    "generalization": ("exact_match", "token_accuracy", "more_probable"),
    "locality": ("unchanged", "tokens_unchanged", "exact_match", "token_accuracy", "more_probable"),
    "portability": ("exact_match", "token_accuracy"),
    "cross_lingual": ("exact_match", "token_accuracy"),
    "belief": ("multiple_choice_most_probable", "yes_no_new_most_probable", "multiple_choice_chosen"),
    "long_answer": ("rouge_l", "sub_questions_contains"),
    "edit_score": ("edit_score",),
    "general": GENERAL,
}


def group_of(name: str) -> str:
    """Return the group of a metric, a key of `GROUPS`."""
    if name in GENERAL:
        return "general"
    if name in GROUPS:
        return name
    return next((key for key, group in GROUPS.items() if group.are_shares and name.startswith(f"{key}_")), "other")


def short_name(name: str) -> str:
    """Return a metric's name without its group."""
    return name.removeprefix(f"{group_of(name)}_")


def label_of(name: str) -> str:
    """Return a metric's name in words, without its group."""
    return LABELS.get(name) or short_name(name).replace("_", " ")


def words_of(name: str) -> str | None:
    """Return what a metric measures in plain words; `None` for a metric that is not ours."""
    if name in WORDS or group_of(name) == "other":
        return WORDS.get(name)
    # a kind's name may begin with another's: the longest is its own
    kinds = [kind for kind in ALL_KINDS.values() if name.startswith(f"{kind.name}_")]
    kind = max(kinds, key=lambda each: len(each.name), default=None)
    words = None if kind is None else WORDS.get(name.removeprefix(f"{kind.name}_"))
    return words if words is None or kind is None else " ".join(filter(None, (kind.in_words, words)))


def higher_is_better(name: str) -> bool | None:
    """Return whether a higher value is better; `None` if that is not known."""
    if name in LOWER_IS_BETTER:
        return False
    return None if group_of(name) == "other" else True


def grouped(results: Mapping[str, MetricResult]) -> dict[str, dict[str, MetricResult]]:
    """Return the metrics by group, in the order of `GROUPS`, without empty groups."""
    groups = {key: {name: result for name, result in results.items() if group_of(name) == key} for key in GROUPS}
    return {key: members for key, members in groups.items() if members}


def headline(key: str, members: Collection[str]) -> str | None:
    """Return the name of the metric that represents a group; `None` if no candidate was measured."""
    names = [f"{key}_{short}" for short in HEADLINES.get(key, ())] + list(HEADLINES.get(key, ()))
    return next((name for name in names if name in members), None)
