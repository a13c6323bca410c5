"""Probes of belief, made from an edit by English templates: an edited model may recall a fact and still deny it.

A data set's own wording (`Edit.belief`) replaces the templates of the same kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.edits import Edit, Probe, fold_case
from ..data.relations import is_english, known_answers, relation_of, template_of
from ..data.scripts import ends_sentence
from .contexts import as_question
from .items import EvalItem

YES, NO = "Yes", "No"
TRUTHS = {"yes": (YES, NO), "no": (YES, NO), "true": ("True", "False"), "false": ("True", "False")}
NUM_TOKENS = 8  # of an answer to a yes / no question: it says so at once, or not
NUM_OTHERS = 2  # choices of a multiple choice besides the new answer and the old one
NUM_OTHER_SUBJECTS = 3
ASKING = frozenset("what who whom whose which where when why how".split())  # noqa: SIM905
# capitals of the first word of a sentence; other capitals are those of names
LOWER_INSIDE = frozenset("The A An In On At Of By For From His Her Its Their This That".split())  # noqa: SIM905
RELATIVE = re.compile(r",\s+(?:which|who|that)\s+(?=[a-z])")
PLACE = re.compile(r",\s+(?=(?:in|from|at|on|by|of)\Z)")
# a kind of yes / no question: the word it asks for, and the right answer
YES_NO = {
    "yes_no_new": ("true", YES),
    "yes_no_old": ("true", NO),
    "negation_new": ("false", NO),
    "negation_old": ("false", YES),
}
MADE = (*YES_NO, "multiple_choice", "either_or", "reversed")
# why a probe is not made
OTHER_LANGUAGE = "the language is not English"
OLD_UNKNOWN = "the old answer is not known, or is the new one"
NO_OTHERS = f"there are no {NUM_OTHERS} answers of other edits to choose from"
NO_SUBJECT = "the subject is not in the prompt"


@dataclass(frozen=True)
class BeliefProbes:
    """The probes of belief of some edits.

    Args:
        probes: for each edit, its probes; their `kind` is a kind of belief, without "belief_".
        left_out: for how many edits a kind of probe is not made, by kind and reason.
    """

    probes: list[list[Probe]]
    left_out: Counter[tuple[str, str]]


def is_question(prompt: str) -> bool:
    """Return whether a prompt asks or orders, rather than begins a sentence that its answer completes.

    Example:
        >>> is_question("What is the capital of Norway?"), is_question("The capital of Norway is")
        (True, False)
    """
    text = prompt.strip()
    return ends_sentence(text) or text.endswith(":") or text.split()[0].lower() in ASKING


def statement(prompt: str, answer: str) -> str:
    """Return what a prompt and an answer say together, as it stands behind "that".

    Example:
        >>> statement("The capital of Norway is", "Bergen")
        'the capital of Norway is Bergen'
        >>> statement("What is the capital of Norway?", "Bergen")
        'the answer to "What is the capital of Norway?" is Bergen'
    """
    if is_question(prompt):
        return f'the answer to "{prompt.strip()}" is {answer.strip()}'
    # "Oslo, which is in" and "Oslo, in" become "Oslo is in"
    clause = PLACE.sub(" is ", RELATIVE.sub(" ", prompt.strip()))
    first, space, rest = clause.partition(" ")
    return f"{first.lower() if first in LOWER_INSIDE else first}{space}{rest} {answer.strip()}"


def choose_between(prompt: str, choices: Sequence[str]) -> str:
    """Return the question which of two or more choices is the answer to a prompt.

    Example:
        >>> choose_between("The capital of Norway is", ["Oslo", "Bergen"])
        'Which completes "The capital of Norway is …": Oslo or Bergen?'
    """
    asked = prompt.strip() if is_question(prompt) else f'Which completes "{prompt.strip()} …":'
    return f"{asked} {', '.join(choices[:-1])} or {choices[-1]}?"


def ask_for_subject(template: str, target: str) -> str:
    """Return the question which subject has an answer.

    Example:
        >>> ask_for_subject("The capital of ____ is", "Bergen")
        'Which name belongs in the blank? "The capital of ____ is Bergen"'
    """
    return f'Which name belongs in the blank? "{template.strip()} {target.strip()}"'


def belief_probes(edits: Sequence[Edit], old_answers: Sequence[str | None], seed: int) -> BeliefProbes:
    """Return the probes of belief of edits: those of the data set, and for other kinds those of our templates.

    Args:
        edits: the edits.
        old_answers: for each edit, the answer before it; `None` if it is not known.
        seed: seed of the order of choices, and of which other answers and subjects are among them.

    Example:
        >>> norway = Edit("The capital of Norway is", "Bergen", subject="Norway", ground_truth="Oslo")
        >>> belief_probes([norway], ["Oslo"], seed=0).probes[0][1]
        Probe(prompt='Is it true that the capital of Norway is Oslo?', answer='No', … choices=('Yes', 'No'), …)
    """
    pool = WrongChoices(edits)
    probes: list[list[Probe]] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for number, (edit, old) in enumerate(zip(edits, old_answers, strict=True)):
        own = [replace(probe, kind=kind_of(probe)) for probe in edit.belief]
        worded = {probe.kind for probe in edit.belief}
        for place, kind in enumerate(MADE):
            if not any(kind.startswith(each) for each in worded if each):
                made = _probe(kind, edit, old, pool, np.random.default_rng((seed, number, place)))
                if isinstance(made, Probe):
                    own.append(made)
                else:
                    left_out[kind, made] += 1
        probes.append(own)
    return BeliefProbes(probes, left_out)


def _probe(kind: str, edit: Edit, old: str | None, pool: WrongChoices, random: np.random.Generator) -> Probe | str:
    """Return the probe of a kind, or why it cannot be made."""
    if not is_english(edit):
        return OTHER_LANGUAGE
    if kind == "reversed":
        template = template_of(edit)
        if template is None or edit.subject is None:
            return NO_SUBJECT
        names = (edit.subject, *pool.subjects(edit, random))
        return Probe(ask_for_subject(template, edit.target), edit.subject, kind=kind, choices=names)
    if old is None or is_among(old, edit.right_answers):
        if kind not in ("yes_no_new", "negation_new"):
            return OLD_UNKNOWN
        old = None
    if kind in YES_NO:
        word, answer = YES_NO[kind]
        said = statement(edit.prompt, old if old is not None and kind.endswith("_old") else edit.target)
        return Probe(f"Is it {word} that {said}?", answer, kind=kind, choices=(YES, NO))
    assert old is not None
    choices = [edit.target, old]
    if kind == "multiple_choice":
        choices += pool.answers(edit, old, random)
        if len(choices) < 2 + NUM_OTHERS:
            return NO_OTHERS
    mixed = tuple(choices[place] for place in random.permutation(len(choices)))
    return Probe(choose_between(edit.prompt, mixed), edit.target, kind=kind, choices=mixed)


def kind_of(probe: Probe) -> str:
    """Return the kind of belief of a data set's own probe, without "belief_"."""
    if probe.kind not in ("yes_no", "negation"):
        return probe.kind if probe.kind in MADE else "other"
    answer = fold_case(probe.answer or "").rstrip(".")
    if answer not in TRUTHS:
        return "other"
    affirmed = answer in ("yes", "true")
    return f"{probe.kind}_{'new' if affirmed is (probe.kind == 'yes_no') else 'old'}"


def is_among(text: str, others: Sequence[str]) -> bool:
    """Return whether a text is one of others, in any case."""
    return fold_case(text) in map(fold_case, others)


class WrongChoices:
    """The answers and subjects of edits, as wrong choices for another edit.

    Those of edits that are like it come first: with the same relation, or with one of its answers as target or old
    answer. Their other answers are then of the same kind, such as cities.
    """

    def __init__(self, edits: Sequence[Edit]) -> None:
        self._edits = edits
        self._relations = [relation_of(edit) for edit in edits]
        self._answers = [known_answers(edit) for edit in edits]

    def answers(self, edit: Edit, old: str, random: np.random.Generator) -> list[str]:
        """Return other edits' targets and old answers, none of them the edit's own."""
        texts = [[other.target, *([other.ground_truth] if other.ground_truth else [])] for other in self._edits]
        return self._drawn(edit, old, texts, (*edit.right_answers, old), NUM_OTHERS, random)

    def subjects(self, edit: Edit, random: np.random.Generator) -> list[str]:
        """Return other edits' subjects, none of which has the edit's target."""
        texts = [
            [other.subject] if other.subject and not is_among(edit.target, other.right_answers) else []
            for other in self._edits
        ]
        return self._drawn(edit, edit.ground_truth, texts, (edit.subject or "",), NUM_OTHER_SUBJECTS, random)

    def _drawn(
        self,
        edit: Edit,
        old: str | None,
        texts: Sequence[Sequence[str]],
        taken: Sequence[str],
        num: int,
        random: np.random.Generator,
    ) -> list[str]:
        order = random.permutation(len(texts)).tolist()
        relation, own = relation_of(edit), known_answers(edit) | {fold_case(old or edit.target)}
        near = [place for place in order if self._relations[place] == relation or self._answers[place] & own]
        drawn = {fold_case(each): "" for each in taken}
        most = len(drawn) + num
        for text in (text for place in (*near, *order) for text in texts[place]):
            if len(drawn) == most:
                break
            drawn.setdefault(fold_case(text), text)
        return [text for text in drawn.values() if text]


def belief_items(edits: Sequence[Edit], probes: Sequence[Sequence[Probe]], *, in_chat: bool) -> list[EvalItem]:
    """Return the items of probes of belief.

    Args:
        edits: the edits.
        probes: for each edit, its probes, as in [`BeliefProbes`].
        in_chat: ask in the chat template. Else a probe in English is asked as "Question: … Answer:", unless it ends
            with a colon itself.
    """
    return [_item(number, edit, probe, in_chat) for number, edit in enumerate(edits) for probe in probes[number]]


def _item(number: int, edit: Edit, probe: Probe, in_chat: bool) -> EvalItem:
    history = edit.history if edit.history is not None else () if in_chat else None
    prompt = probe.prompt
    if history is None and is_english(edit) and not prompt.rstrip().endswith(":"):
        prompt = as_question(prompt)
    choices = probe.choices
    if not choices and probe.answer is not None:
        choices = TRUTHS.get(fold_case(probe.answer).rstrip("."), ())
    expected = next((each for each in choices if is_among(each, probe.right_answers)), probe.answer)
    return EvalItem(
        number,
        f"belief_{probe.kind}",
        prompt,
        expected,
        None,
        history,
        probe.aliases,
        choices=choices,
        max_new_tokens=NUM_TOKENS if choices in TRUTHS.values() else None,
        language=probe.language,
    )
