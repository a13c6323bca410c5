"""The metrics by name, `{kind}_{metric}`: how each scores a model's reply, and its base's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from .items import EvalItem, Kind, Reply
from .scoring import contains, exact_match, is_more_probable, same_first_word, token_accuracy

Protocol = Literal["generation", "token_accuracy", "probability", "fluency"]
# (item, the model's reply, the base's reply or `None`) to a score from 0 to 1, or `None` if it cannot be scored
Scoring = Callable[[EvalItem, Reply, Reply | None], float | None]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        protocol: the protocol that produces the replies it needs.
        kinds: the kinds of items it applies to.
        meaning: in words, for a report.
        score: scores one item.
        needs_base: it compares with the base's reply, so the base has no score of its own.
        alias: its name in the literature, by kind.
    """

    protocol: Protocol
    kinds: tuple[Kind, ...]
    meaning: str
    score: Scoring
    needs_base: bool = False
    alias: tuple[tuple[Kind, str], ...] = ()


def _exact_match(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    if not item.right_answers or reply.text is None:
        return None
    return float(any(exact_match(reply.text, right) for right in item.right_answers))


def _contains(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    if not item.right_answers or reply.long_text is None:
        return None
    return float(any(contains(reply.long_text, right) for right in item.right_answers))


def _token_accuracy(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    return None if reply.expected is None else token_accuracy(reply.expected.predicted, reply.expected_ids)


def _more_probable(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    if reply.expected is None or reply.other is None or item.expected == item.other:
        return None
    return float(is_more_probable(reply.expected.log_probs, reply.other.log_probs))


def _unchanged(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = base is not None and base.text is not None and reply.text is not None
    return float(exact_match(reply.text or "", base.text or "")) if known and base else None


def _first_word_unchanged(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = base is not None and base.text is not None and reply.text is not None
    return float(same_first_word(reply.text or "", base.text or "")) if known and base else None


def _tokens_unchanged(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    if base is None or base.expected is None or reply.expected is None:
        return None
    return token_accuracy(reply.expected.predicted, base.expected.predicted)


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        "generation",
        KINDS,
        "the greedy answer, cut at the first full stop or line break, equals a right answer",
        _exact_match,
    ),
    "contains": Metric("generation", KINDS, "the greedy answer contains a right answer as whole words", _contains),
    "token_accuracy": Metric(
        "token_accuracy",
        KINDS,
        "share of the right answer's tokens that the model predicts, each given the right tokens before it",
        _token_accuracy,
        alias=(("reliability", "rewrite_acc"), ("generalization", "rephrase_acc"), ("portability", "portability_acc")),
    ),
    "more_probable": Metric(
        "probability",
        ("reliability", "generalization", "locality"),
        "the right answer is more probable than the one it is compared with, by the mean log p of its tokens",
        _more_probable,
        alias=(("reliability", "ES"), ("generalization", "PS"), ("locality", "NS")),
    ),
    "unchanged": Metric(
        "generation", ("locality",), "the greedy answer equals the base model's", _unchanged, needs_base=True
    ),
    "first_word_unchanged": Metric(
        "generation",
        ("locality",),
        "the greedy answer begins with the same word as the base model's",
        _first_word_unchanged,
        needs_base=True,
    ),
    "tokens_unchanged": Metric(
        "token_accuracy",
        ("locality",),
        "share of the right answer's positions where the model predicts the same token as the base model",
        _tokens_unchanged,
        needs_base=True,
        alias=(("locality", "EasyEdit's locality"),),
    ),
}
EDIT_SCORE = "edit_score"
LOWER_IS_BETTER = ("perplexity", "kl_from_base", "loss")
EDIT_SCORE_PARTS = ("reliability_more_probable", "generalization_more_probable", "locality_more_probable")

NO_ITEMS = {
    "generalization": "no edit has rephrasings",
    "locality": "no edit has locality probes",
    "portability": "no edit has portability probes",
}


def metric_names(protocols: Sequence[str]) -> dict[str, tuple[Kind, Metric]]:
    """Return the metrics of some protocols by name, kind by kind."""
    return {
        f"{kind}_{suffix}": (kind, metric)
        for kind, (suffix, metric) in product(KINDS, METRICS.items())
        if metric.protocol in protocols and kind in metric.kinds
    }


def meaning_of(name: str) -> str:
    """Return what a metric of [`metric_names`] measures, with its name in the literature."""
    kind, metric = metric_names(get_args(Protocol))[name]
    alias = dict(metric.alias).get(kind)
    return f"{metric.meaning} ({alias})" if alias else metric.meaning


def why_missing(metric: Metric, kind: Kind, items: Sequence[EvalItem], has_base: bool) -> str:
    """Return why a metric has no value for any item."""
    if not any(item.kind == kind for item in items):
        return NO_ITEMS[kind]
    if metric.needs_base and not has_base:
        return "there is no base model to compare with: pass a PEFT model, or base_model"
    if metric.protocol == "probability":
        return (
            "no edit has a ground_truth other than its target"
            if kind != "locality"
            else "no locality probe has an answer other than the edit's target"
        )
    return f"no {kind} probe has an answer"
