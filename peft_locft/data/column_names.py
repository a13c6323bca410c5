"""What the columns of the known data sets are called, and which of them hold prompt and target."""

import functools
import re
from collections.abc import Mapping, Set
from itertools import chain
from typing import Any, NamedTuple

from .field_values import is_absent

# the columns of prompt and target in the known data sets, and whose they are
VOCABULARIES = {
    ("prompt", "target"): "peft_locft",
    ("prompt", "target_new"): "EasyEdit",
    ("src", "alt"): "ZsRE",
    ("prompt", "completion"): "TRL",
    ("messages",): "a conversation, as in TRL",
    ("requested_rewrite",): "CounterFact as first published, MQuAKE, AKEW",
    ("edit",): "RippleEdits, UniEdit",
    ("update", "ans"): "WikiBigEdit",
    ("input", "alternatives"): "MEND",
    ("text", "labels"): "WikiBio of KnowEdit",
    ("question", "object"): "HalluEditBench",
}
# columns that people give the two, where no data set says; one of each, in any combination
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query", "fact")
TARGET_NAMES = ("target", "answer", "output", "response", "new", "new_target", "new_answer", "target_new", "alt")
# the same, where no column has one of these names
OTHER_PROMPT_NAMES = ("src", "text", "update", "claim", "sentence", "cloze")
OTHER_TARGET_NAMES = (
    "answers",
    "targets",
    "label",
    "labels",
    "object",
    "new_object",
    "ans",
    "answer_new",
    "completion",
)

# columns of one text each; the first that is filled is read
ONE_TEXT = {
    "subject": ("subject", "subject_label", "concept", "entity"),
    "relation": ("relation", "relation_label", "relation_id", "predicate"),
    "language": ("language", "lang"),
    "ground_truth": (
        *("ground_truth", "answers", "target_true", "target_old", "old_target", "old", "old_answer", "answer_true"),
        *("original_answer", "prediction", "pred"),
    ),
}
TARGET_ALIASES = ("aliases", "target_aliases", "target_new_aliases", "answer_alias", "answer_aliases", "alt_aliases")
PARAPHRASES = "paraphrases"  # to train on; every other name of other wordings is to evaluate
REPHRASING = re.compile(
    r"(filtered_)?(rephras(e|es|ed|ing|ings)|para|paraphras(e|ed|ing|ings))(_(prompt|question|query)(s|ies)?)?_?\d*"
)

# the stems of the names of probes, as in loc_ans and port_question, by field, with the kind of the probe
HOPS = r"(portability_)?((?P<hops>\d+|one|two|three|four|five|six|m|multi)_?)?hops?"
STEMS = {
    "locality": {
        "loc": "",
        "local": "",
        "locality": "",
        "neighbou?r(hood)?": "same_relation",
        "unrelated": "",
        "relation_specifi(ci)?ty": "same_subject",
        "forgetfulness": "forgetfulness",
    },
    "portability": {
        "port": "",
        "portability": "",
        HOPS: "multi_hop",
        "(portability_)?personas?": "persona",
        "reasoning": "multi_hop",
        "logical_generali[sz]ation": "logical_generalization",
        "subject_aliasing": "subject_aliasing",
        "compositionality(_i|_ii)?": "multi_hop",
    },
    "generality": {"generality": "", "generali[sz]ation": ""},
    "belief": {
        "belief": "",
        "yes": "yes_no",
        "no": "yes_no",
        "negat(ion|ed)": "negation",
        "revers(ed?|al)(_relation)?": "reversed",
    },
    "cross_lingual": {"cross_?lingual": ""},
    "sub_questions": {"sub": "", "sub_?questions?": "", "unsfact_triplets(_gpt)?": ""},
}
PROMPT_WORDS = "prompts?|questions?|query|queries|inputs?|probes?|data"
ANSWER_WORDS = "ans|answers?|ground_truths?|targets?|outputs?|labels?|alias(es)?|ans(wer)?_alias(es)?"
# these stems are also common words, so that a column is a probe only with one of the words
NEEDS_WORD = ("yes", "no", "sub", "local")

# what is no part of an edit: numbers of records, where they are from, what programs have measured of them
NO_TEXT = re.compile(
    r"(.*_)?(ids?|idx|index|uuid|hash|url)|(eval|score|acc|accuracy|len)_.*|.*_(score|id|idx|label_?id|scores)"
    r"|cond|pred(iction)?s?|output_.*|source|topic|domain|tag|category|split|date|time|type|example_type|path_type|loc_type|query_type|paths?"
    r"|orig|meta|metadata|provenance|description|head_entity|tail_entity|property|recalled_relation|phrase|hash"
    r"|unnamed:.*|column \d+"
)
# names of what a reader would miss: rephrasings, probes, and parts of a prompt
MISSED = re.compile(
    "rephras|paraphras|locality|portab|neighbo|context|system|history|hop|prompt|question|answer|alias|choice|alternativ|^input$"
)
ENOUGH_WORDS = 3  # from so many on, a text may be a prompt

SHAPE = """A file that works, edits.csv:
  prompt,target
  The capital of Norway is,Bergen"""

SHAPE_OF_JSON = """A file that works, edits.json:
  [{"prompt": "The capital of Norway is", "target": "Bergen"}]"""


class ProbeColumn(NamedTuple):
    """What the name of a column says of the probes in it.

    Args:
        field: the field of the edit, or `"generality"`.
        stem: what it shares with the column of the answers.
        word: `"prompt"`, `"answer"`, `"alias"`, or `""` if the name is only the stem.
        kind: the kind of the probes.
    """

    field: str
    stem: str
    word: str
    kind: str


@functools.lru_cache(maxsize=10_000)
def probe_column(name: str) -> ProbeColumn | None:
    """Return what a column of probes is, by its name; `None` for another column."""
    for field, stems in STEMS.items():
        for stem, kind in stems.items():
            found = _after_stem(stem).fullmatch(name) or _before_stem(stem).fullmatch(name)
            if found is None or (not found["word"] and found["stem"] in NEEDS_WORD):
                continue
            word = found["word"] or ""
            role = "alias" if "alias" in word else "prompt" if re.fullmatch(PROMPT_WORDS, word) else "answer"
            is_one_hop = "hops" in found.groupdict() and found["hops"] in ("1", "one")
            shared = found["stem"] + (found["number"] or "").strip("_")
            return ProbeColumn(field, shared, role if word else "", "one_hop" if is_one_hop else kind)
    return None


@functools.cache
def _after_stem(stem: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<stem>{stem})(_?(?P<word>{PROMPT_WORDS}|{ANSWER_WORDS}))?(?P<number>_?\d+)?")


@functools.cache
def _before_stem(stem: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<word>{PROMPT_WORDS}|{ANSWER_WORDS})_(?P<stem>{stem})(?P<number>_\d+)?")


KNOWN_NAMES = {
    *chain.from_iterable(VOCABULARIES),
    *(*PROMPT_NAMES, *TARGET_NAMES, *OTHER_PROMPT_NAMES, *OTHER_TARGET_NAMES),
    *chain.from_iterable(ONE_TEXT.values()),
    *TARGET_ALIASES,
    PARAPHRASES,
}


@functools.lru_cache(maxsize=10_000)
def is_known(name: str) -> bool:
    """Return whether a column of this name is read where it stands in a record of an edit."""
    return name in KNOWN_NAMES or bool(REPHRASING.fullmatch(name)) or probe_column(name) is not None


def plain_name(name: object) -> str:
    """Return a name in lower case, with underscores for spaces and dashes."""
    return re.sub(r"[\s\-]+", "_", str(name).strip()).casefold()


@functools.lru_cache(maxsize=10_000)
def column_name(name: object) -> str:
    """Return a known column's name in lower case, with underscores for spaces and dashes; others as they are."""
    own = str(name).strip()
    known = plain_name(own)
    return known if is_known(known) or MISSED.search(known) or NO_TEXT.fullmatch(known) else own


def with_column_names(row: object) -> object:
    """Return a record with its names as `column_name` gives them; a ValueError if two are the same; else the row."""
    if not isinstance(row, Mapping):
        return row
    renamed = {column_name(name): value for name, value in row.items()}
    if len(renamed) < len(row):
        return ValueError(f"found the fields {', '.join(map(str, row))}; expected different names: rename one")
    return renamed


def vocabularies(columns: Set[str]) -> list[tuple[str, ...]]:
    """Return the pairs of columns that hold prompt and target: those of a data set or, without one, of any names."""
    found: list[tuple[str, ...]] = [vocabulary for vocabulary in VOCABULARIES if columns >= set(vocabulary)]
    for prompts, targets in (
        (PROMPT_NAMES, TARGET_NAMES),
        (PROMPT_NAMES, OTHER_TARGET_NAMES),
        (OTHER_PROMPT_NAMES, (*TARGET_NAMES, *OTHER_TARGET_NAMES)),
    ):
        found = found or [(prompt, target) for prompt in prompts for target in targets if {prompt, target} <= columns]
    return found


def find_vocabulary(place: str, records: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the columns of prompt and target of records, of which there may be none.

    Raises:
        ValueError: if there is not exactly one pair; it begins with the place.
    """
    columns = dict.fromkeys(chain.from_iterable(records))
    found = vocabularies(columns.keys())
    if len(found) > 1:
        # `input` beside `instruction` is often empty in every record
        filled = {name for record in records for name, value in record.items() if not is_absent(value)}
        found = vocabularies(filled) or found
    if records and len(found) != 1:
        raise ValueError(_unrecognized(place, columns, found))
    return found[0] if records else ()


def _unrecognized(place: str, columns: Mapping[str, None], found: list[tuple[str, ...]]) -> str:
    shown = f"found the columns {', '.join(map(str, columns))}"
    if not found:
        known = "; ".join(f"{' and '.join(names)} ({owner})" for names, owner in VOCABULARIES.items())
        expected = f"expected exactly one of {known}; or question and answer, instruction and output, fact and new"
        advice = "rename the columns. Is the line with their names missing?"
        return f"{place}: no prompt / target columns recognized: {shown}; {expected}: {advice}\n{SHAPE}"
    pairs = "; ".join(" and ".join(names) for names in found)
    return (
        f"{place}: several prompt / target columns: {shown}, so prompt and target may be {pairs}; expected exactly "
        "one pair: rename or remove columns, or join those that belong together"
    )


def looks_like_a_part(name: str, value: object) -> bool:
    """Return whether a column that is not read looks like a part of an edit: by its name, or by the text in it."""
    if is_absent(value) or NO_TEXT.fullmatch(name.casefold()):
        return False
    return bool(MISSED.search(name.casefold())) or _holds_a_prompt(value)


def _holds_a_prompt(value: object) -> bool:
    if isinstance(value, str):
        return len(value.split()) >= ENOUGH_WORDS
    if isinstance(value, Mapping):
        return any(looks_like_a_part(str(name), each) for name, each in value.items())
    return isinstance(value, (list, tuple)) and any(map(_holds_a_prompt, value))
