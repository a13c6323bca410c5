"""The metrics by name, `{kind}_{metric}`: how each scores a model's reply, and its base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .items import EvalItem, Reply
from .kinds import ALL_KINDS, PUBLISHED, Kind
from .long_answers import rouge_l
from .scoring import contains, exact_match, first_choice, is_more_probable, same_first_word, token_accuracy
from .similarity import NOT_THERE

Protocol = Literal["generation", "token_accuracy", "probability", "fluency"]
# (item, the model's reply, the base's reply or `None`) to a score from 0 to 1, or `None` if it cannot be scored
Scoring = Callable[[EvalItem, Reply, Reply | None], float | None]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Args:
        protocol: the protocol that produces the replies it needs.
        meaning: in words, for a report.
        score: scores one item.
        needs_base: it compares with the base's reply, so the base has no score of its own.
        by_choice: it counts one of the item's choices, so that chance alone gives it one in their number.
    """

    protocol: Protocol
    meaning: str
    score: Scoring
    needs_base: bool = False
    by_choice: bool = False


def _exact_match(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = item.expected is not None and reply.text is not None
    return float(exact_match(reply.text or "", item.expected or "")) if known else None


def _contains(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = item.expected is not None and reply.long_text is not None
    return float(contains(reply.long_text or "", item.expected or "")) if known else None


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


def _chosen(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = item.choices and item.expected is not None and reply.long_text is not None
    return float(first_choice(reply.long_text or "", item.choices) == item.expected) if known else None


def _most_probable(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    if not reply.choices or item.expected not in item.choices:
        return None
    by_choice = dict(zip(item.choices, reply.choices, strict=True))
    right = by_choice.pop(item.expected)
    return float(all(is_more_probable(right.log_probs, wrong.log_probs) for wrong in by_choice.values()))


def _says_target(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = item.other is not None and reply.long_text is not None
    return float(contains(reply.long_text or "", item.other or "")) if known else None


def _rouge_l(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    known = item.expected is not None and reply.text is not None
    return rouge_l(reply.text or "", item.expected or "") if known else None


def _embedding_similarity(item: EvalItem, reply: Reply, base: Reply | None) -> float | None:
    return reply.similarity


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        "generation",
        "the greedy answer, cut at the first full stop or line break, equals the right answer",
        _exact_match,
    ),
    "contains": Metric("generation", "the greedy answer contains the right answer as whole words", _contains),
    "token_accuracy": Metric(
        "token_accuracy",
        "share of the right answer's tokens that the model predicts, each given the right tokens before it",
        _token_accuracy,
    ),
    "more_probable": Metric(
        "probability",
        "the right answer is more probable than the one it is compared with, by the mean log p of its tokens",
        _more_probable,
    ),
    "unchanged": Metric("generation", "the greedy answer equals the base model's", _unchanged, needs_base=True),
    "first_word_unchanged": Metric(
        "generation",
        "the greedy answer begins with the same word as the base model's",
        _first_word_unchanged,
        needs_base=True,
    ),
    "tokens_unchanged": Metric(
        "token_accuracy",
        "share of the right answer's positions where the model predicts the same token as the base model",
        _tokens_unchanged,
        needs_base=True,
    ),
    "chosen": Metric(
        "generation", "of the choices, the greedy answer names the right one first", _chosen, by_choice=True
    ),
    "most_probable": Metric(
        "probability",
        "of the choices, the right one is the most probable, by the mean log p of its tokens",
        _most_probable,
        by_choice=True,
    ),
    "says_target": Metric("generation", "the greedy answer contains the edit's target; lower is better", _says_target),
    "rouge_l": Metric(
        "generation", "F1 of the longest common subsequence of words, of the whole answer and the target", _rouge_l
    ),
    "embedding_similarity": Metric(
        "generation", "cosine of the embeddings of the whole answer and the target", _embedding_similarity
    ),
}
EDIT_SCORE = "edit_score"
SAYS_TARGET = tuple(f"{name}_says_target" for name, kind in ALL_KINDS.items() if "says_target" in kind.metrics)
LOWER_IS_BETTER = ("perplexity", "kl_from_base", "loss", *SAYS_TARGET)
EDIT_SCORE_PARTS = ("reliability_more_probable", "generalization_more_probable", "locality_more_probable")


def metric_names(
    protocols: Sequence[str], kinds: Mapping[str, Kind] = PUBLISHED
) -> dict[str, tuple[Kind, str, Metric]]:
    """Return the metrics of some protocols and kinds by name, kind by kind: each its kind, short name and metric."""
    return {
        f"{kind.name}_{short}": (kind, short, metric)
        for kind in kinds.values()
        for short, metric in METRICS.items()
        if metric.protocol in protocols and short in kind.metrics
    }


def why_missing(metric: Metric, kind: Kind, items: Sequence[EvalItem], has_base: bool) -> str:
    """Return why a metric has no value for any item."""
    if not any(item.kind == kind.name for item in items):
        return kind.none
    if metric.needs_base and not has_base:
        return "there is no base model to compare with: pass a PEFT model, or base_model"
    if metric is METRICS["embedding_similarity"]:
        return NOT_THERE
    if metric is METRICS["more_probable"]:
        return (
            "no edit has a ground_truth other than its target"
            if kind.name != "locality"
            else "no locality probe has an answer other than the edit's target"
        )
    return f"no {kind.name} probe has an answer"
