"""What an edit says of its subject: its prompt with a blank, and which edits say the same of theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from itertools import islice

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.decoding import check_fits, generate_and_score
from ..engine.model_state import as_base
from ..engine.preparations import Preparations
from ..engine.questions import UNTIL_EOS, Question
from .edits import Edit, fold_case, prompts_of
from .encoding import encode_prompts
from .leaks import is_trained
from .scripts import replace_word

BLANK = "____"
ENGLISH = ("en", "eng", "english")
LATIN_SHARE = 0.8  # of the letters of an edit in English, at least


def template_of(edit: Edit, blank: str = BLANK) -> str | None:
    """Return an edit's prompt with a blank for its subject; `None` if the subject is not a whole word in it.

    Example:
        >>> template_of(Edit("The capital of Norway is", "Bergen", subject="Norway"))
        'The capital of ____ is'
    """
    if not edit.subject:
        return None
    template = replace_word(edit.prompt, edit.subject, blank)
    return None if template == edit.prompt else template


def relation_of(edit: Edit) -> str:
    """Return what identifies the relation of an edit: its relation, or else its prompt without the subject."""
    return edit.relation or fold_case(template_of(edit) or edit.prompt)


def known_answers(edit: Edit) -> set[str]:
    """Return an edit's target, its aliases and the answer before it, in the form of `edits.fold_case`."""
    return {fold_case(each) for each in (*edit.right_answers, edit.ground_truth or edit.target)}


def is_english(edit: Edit) -> bool:
    """Return whether English templates fit an edit: its language is English, or not said and its letters are Latin."""
    if edit.language is not None:
        return re.split("[-_]", edit.language.lower())[0] in ENGLISH
    letters = [letter for letter in edit.prompt + edit.target if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) >= LATIN_SHARE * len(letters)


def same_subject(edits: Sequence[Edit], seed: int, num: int, trained: Set[str] = frozenset()) -> list[list[str]]:
    """Return, for each edit, other edits' prompts with its subject: other facts about what it changed.

    An edit with another relation gives its prompt. Where relations are not named, a prompt whose known answers are
    among the edit's own is left out, since it probably asks for the same fact in other words.

    Args:
        edits: the edits; those without a subject in their prompt neither get prompts nor give any.
        seed: seed of the choice.
        num: number of prompts for an edit, at most.
        trained: hashes of trained prompts, from `leaks.trained_prompts`; these prompts are left out.

    Returns:
        A list of prompts per edit. None is a prompt, paraphrase, rephrasing or probe of an edit (compared by
        `edits.fold_case`).

    Example:
        >>> norway = Edit("The capital of Norway is", "Bergen", subject="Norway")
        >>> ibsen = Edit("Ibsen spoke", "Danish", subject="Ibsen")
        >>> same_subject([norway, ibsen], 0, 1)
        [['Norway spoke'], ['The capital of Ibsen is']]
    """
    templates: dict[str, tuple[str, str | None, set[str]]] = {}
    for edit in edits:
        if edit.subject and (template := template_of(edit)):
            _, _, answers = templates.setdefault(relation_of(edit), (template, edit.language, set()))
            answers |= known_answers(edit)
    relations = list(templates)
    known = {fold_case(prompt) for edit in edits for prompt in prompts_of(edit)}
    prompts = []
    for number, edit in enumerate(edits):
        own: list[str] = []
        order = np.random.default_rng((seed, number)).permutation(len(relations)) if edit.subject else ()
        for relation in (relations[place] for place in order):
            if len(own) == num:
                break
            template, language, answers = templates[relation]
            is_same = relation == relation_of(edit) or (not edit.relation and bool(answers & known_answers(edit)))
            prompt = template.replace(BLANK, edit.subject or "")
            if is_same or language != edit.language or fold_case(prompt) in known:
                continue
            if not is_trained(prompt, trained):
                own.append(prompt)
        prompts.append(own)
    return prompts


def answered_otherwise(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    prompts: Sequence[Sequence[str]],
    num: int,
    *,
    preparations: Preparations | None = None,
) -> list[list[str]]:
    """Return, for each edit, the first of some prompts that the base begins to answer otherwise than the edit's own.

    One whose answer begins with the same token may ask for the same fact in other words. To keep its answer would
    work against the edit.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer.
        edits: the edits.
        prompts: (edits,) prompts for each edit, such as those of [`same_subject`].
        num: number of prompts for an edit, at most.
        preparations: stores the first tokens for later calls.

    Raises:
        ValueError: if a prompt cannot be encoded, or is too long for the model.
    """
    texts = list(dict.fromkeys(text for edit, own in zip(edits, prompts, strict=True) for text in (edit.prompt, *own)))
    if not any(prompts):
        return [[] for _ in edits]
    encoded = encode_prompts(texts, tokenizer)
    questions = [Question(tuple(ids), num_stops=UNTIL_EOS, max_new_tokens=1) for ids in encoded]
    check_fits(model, questions, tokenizer)

    def first_tokens() -> list[int]:
        with as_base(model):
            answers = generate_and_score(model, tokenizer, questions, label="the base", progress=False)
        return [answer.token_ids[0] for answer in answers]

    begins = dict(zip(texts, (preparations or Preparations(model)).stored([encoded, 1], first_tokens), strict=True))
    return [
        list(islice((text for text in own if begins[text] != begins[edit.prompt]), num))
        for edit, own in zip(edits, prompts, strict=True)
    ]
