"""Kinds of items: under which protocol each is asked, which metrics score it, and what papers call these figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .contexts import CONTEXTS

AS_IT_IS = "as it is"
OF_TEXT_ONLY = "ordinary text"
ASKED = ("exact_match", "contains", "token_accuracy")
CHOSEN = ("chosen", "most_probable")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a reply measures.

    Args:
        name: the first part of its metrics' names.
        protocol: how its prompts are asked.
        metrics: the metrics that score it, as in `METRICS`.
        in_words: how its prompts are asked, in a plain sentence; `""` as it is.
        none: why a report has no such metric, if no edit has such a prompt.
        in_papers: what papers call its figures, by metric; `""` for those without a name of their own.
    """

    name: str
    protocol: str
    metrics: tuple[str, ...]
    none: str
    in_words: str = ""
    in_papers: Mapping[str, str] = field(default_factory=dict)

    def paper_names(self, metric: str) -> str:
        """Return what papers call a metric of this kind, or the kind; `""` if they have no word for it."""
        return self.in_papers.get(metric, self.in_papers.get("", ""))


PUBLISHED = {
    kind.name: kind
    for kind in (
        Kind(
            "reliability",
            AS_IT_IS,
            (*ASKED, "more_probable"),
            "there are no edits",
            in_papers={"token_accuracy": "rewrite_acc", "more_probable": "ES", "": "Efficacy, Rel., Edit success"},
        ),
        Kind(
            "generalization",
            AS_IT_IS,
            (*ASKED, "more_probable"),
            "no edit has rephrasings",
            in_papers={"token_accuracy": "rephrase_acc", "more_probable": "PS", "": "Gen., Paraphrase"},
        ),
        Kind(
            "locality",
            AS_IT_IS,
            (*ASKED, "more_probable", "unchanged", "first_word_unchanged", "tokens_unchanged"),
            "no edit has locality probes",
            in_papers={
                "tokens_unchanged": "EasyEdit's locality",
                "more_probable": "NS",
                "": "Loc., Specificity, Neighborhood",
            },
        ),
        Kind(
            "portability",
            AS_IT_IS,
            ASKED,
            "no edit has portability probes",
            in_papers={"token_accuracy": "portability_acc", "": "Port."},
        ),
    )
}
IN_CONTEXT = {
    context: "Asked " + sentence
    for context, sentence in {
        "question_answer": 'as "Question: … Answer:".',
        "few_shot": "after three answered questions.",
        "chat": "in the chat template.",
        "after_paragraph": "after an unrelated paragraph.",
        "second_turn": "as the second question of a conversation.",
    }.items()
}
CONTEXT_KINDS = {
    f"{kind}_{context}": Kind(
        f"{kind}_{context}",
        f"in context: {context.replace('_', ' ')}",
        ASKED,
        PUBLISHED[kind].none,
        IN_CONTEXT[context],
        {"": PUBLISHED[kind].in_papers[""]},
    )
    for context in CONTEXTS
    for kind in ("reliability", "generalization")
}
_NO_BELIEF = "no edit has such a probe, and none could be made"
BELIEF_KINDS = {
    f"belief_{name}": Kind(f"belief_{name}", "belief", metrics, _NO_BELIEF, in_words, {"": papers})
    for name, metrics, in_words, papers in (
        ("yes_no_new", CHOSEN, 'Is the new answer true? Right: "yes".', "yes / no questions"),
        ("yes_no_old", CHOSEN, 'Is the old answer true? Right: "no".', "yes / no questions"),
        ("negation_new", CHOSEN, 'Is the new answer false? Right: "no".', "negation"),
        ("negation_old", CHOSEN, 'Is the old answer false? Right: "yes".', "negation"),
        ("multiple_choice", CHOSEN, "The new answer, the old one or another?", "multiple choice, MCQ"),
        ("either_or", CHOSEN, "The new answer or the old one?", "either-or, forced choice"),
        (
            "reversed",
            ("contains", "most_probable"),
            "Which subject has the new answer?",
            "reversal, reversed questions",
        ),
        ("other", (*CHOSEN, "exact_match", "contains"), "Asked in the data set's own words.", "belief"),
    )
}
RING_KINDS = {
    f"locality_{name}": Kind(
        f"locality_{name}",
        "locality rings",
        ("first_word_unchanged", "says_target"),
        none,
        in_words,
        {"says_target": f"over-reach, bleedover ({papers})", "": f"Loc. ({papers})"},
    )
    for name, none, in_words, papers in (
        ("same_subject", "no other edit's relation fits", "Asked of the same subject, another fact.", "same subject"),
        ("same_relation", "no other subjects were found", "Asked of another subject, the same fact.", "same relation"),
        ("unrelated", "there are no edits in English", "The beginning of an unrelated sentence.", "unrelated"),
    )
}
MULTI_HOP_KINDS = {
    "portability_multi_hop": Kind(
        "portability_multi_hop",
        "multi-hop",
        ASKED,
        "no edit has portability probes of the kind multi_hop",
        "Asked over two or more facts.",
        {"": "multi-hop accuracy, compositionality"},
    )
}
LONG_KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "long_answer",
            "long answers",
            ("rouge_l", "embedding_similarity"),
            "no edit has a target of several sentences",
            "The whole text of a long answer.",
            {"rouge_l": "ROUGE-L", "embedding_similarity": "BERT score, semantic similarity"},
        ),
        Kind(
            "long_answer_sub_questions",
            "long answers",
            ("exact_match", "contains"),
            "no edit has sub_questions",
            "Asked about a part of a long answer.",
            {"": "sub-question accuracy"},
        ),
    )
}
BY_PROBES = {
    "belief": BELIEF_KINDS,
    "locality_rings": RING_KINDS,
    "multi_hop": MULTI_HOP_KINDS,
    "long_answers": LONG_KINDS,
}
# asked if an edit has any, as portability is
OTHER_LANGUAGE_KINDS = {
    "cross_lingual": Kind(
        "cross_lingual",
        "asked in another language",
        ASKED,
        "no edit has questions in another language",
        "Asked in another language than edited.",
        {"": "cross-lingual reliability, cross-lingual transfer"},
    )
}
ALL_KINDS: dict[str, Kind] = (
    PUBLISHED | OTHER_LANGUAGE_KINDS | CONTEXT_KINDS | BELIEF_KINDS | RING_KINDS | MULTI_HOP_KINDS | LONG_KINDS
)


def asked_kinds(contexts: Sequence[str], probes: Sequence[str]) -> dict[str, Kind]:
    """Return the kinds of items that settings ask for: the published ones, then those of contexts and probes."""
    kinds = dict(PUBLISHED)
    for context in contexts:
        kinds |= {name: kind for name, kind in CONTEXT_KINDS.items() if name.endswith(f"_{context}")}
    for name in probes:
        kinds |= BY_PROBES[name]
    return kinds
