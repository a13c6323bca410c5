"""Records of data sets that hold more than one edit in its columns: several languages, rewrites, whole sentences."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .column_names import vocabularies, with_column_names
from .edit_types import same_text
from .field_values import ANSWER_KEYS, is_absent, right_answers, text, unpacked
from .languages import language_code

Fields = dict[str, Any]


def by_language(row: Mapping[str, Any]) -> dict[str, Fields]:
    """Return the records of one fact in several languages, by language code; nothing if it has only one.

    A language may hold a record (MzsRE, BMIKE-53), also within another field; every column may hold its text in each
    language; or the names of the columns may end in a language.
    """
    nested = {code: value for name, value in row.items() if (code := language_code(name)) and _is_edit(value)}
    if nested:
        others = {name: value for name, value in row.items() if language_code(name) not in nested}
        return {code: {**others, **_named(value)} for code, value in nested.items()}
    for name, value in row.items():
        if isinstance(value, (Mapping, list, tuple)) and (within := _languages_within(value)):
            own = {other: each for other, each in row.items() if other != name}
            code = language_code(row.get("language", row.get("lang", "en"))) or "en"
            return ({code: own} if vocabularies(own.keys()) else {}) | within
    if any(isinstance(value, Mapping) for value in row.values()) and (spoken := _by_column(row)):
        return spoken
    return _by_ending(row) if any(language_code(str(name).rpartition("_")[2]) for name in row) else {}


def _is_edit(value: object) -> bool:
    return isinstance(value, Mapping) and len(vocabularies(_named(value).keys())) == 1


def _named(value: Mapping[str, Any]) -> Fields:
    named = with_column_names(value)
    return dict(named) if isinstance(named, Mapping) else dict(value)


def _languages_within(value: object) -> dict[str, Fields]:
    """Return the records by language in one field: a mapping, or a list of records that say their language."""
    if isinstance(value, (list, tuple)) and value and all(map(_is_edit, value)):
        records = [_named(each) for each in value]
        codes = [language_code(each.get("language", each.get("lang"))) for each in records]
        return {str(code): each for code, each in zip(codes, records, strict=True)} if all(codes) else {}
    if isinstance(value, Mapping) and value and all(language_code(key) and _is_edit(value[key]) for key in value):
        return {str(language_code(key)): _named(each) for key, each in value.items()}
    return {}


def _by_column(row: Mapping[str, Any]) -> dict[str, Fields]:
    """Return the records of a row whose columns hold a mapping from languages to texts."""
    spoken = {
        name: {language_code(key): each for key, each in value.items()}
        for name, value in row.items()
        if isinstance(value, Mapping) and value and all(map(language_code, value))
    }
    found = vocabularies(row.keys())
    if len(found) != 1 or not set(found[0]) <= spoken.keys():
        return {}
    shared = {name: value for name, value in row.items() if name not in spoken}
    return {
        str(code): shared | {name: each[code] for name, each in spoken.items() if code in each}
        for code in spoken[found[0][0]]
    }


def _by_ending(row: Mapping[str, Any]) -> dict[str, Fields]:
    """Return the records of a row with columns such as `prompt_de` and `target_de`."""
    found: dict[str, Fields] = {}
    for name, value in row.items():
        stem, _, ending = str(name).rpartition("_")
        code = language_code(ending)
        if stem and code is not None:
            found.setdefault(code, {})[stem] = value
    found = {code: _named(each) for code, each in found.items() if _is_edit(each)}
    taken = {f"{name}_{code}" for code, each in found.items() for name in each}
    shared = {name: value for name, value in row.items() if str(name).casefold().replace("-", "_") not in taken}
    own = {"en": shared} if found and len(vocabularies(shared.keys())) == 1 and "en" not in found else {}
    return own | {code: each if own else shared | each for code, each in found.items()}


def edited_record(row: Mapping[str, Any], language: str | None) -> tuple[Mapping[str, Any], dict[str, Fields]]:
    """Return the record of the language to edit, and those of the other languages.

    Args:
        row: a record, in one language or several.
        language: the language to edit; `None`: English, or else the first.

    Raises:
        ValueError: if the record is in several languages, and this is none of them.
    """
    spoken = by_language(row)
    if not spoken:
        return row, {}
    wanted = language_code(language) if language is not None else "en" if "en" in spoken else next(iter(spoken))
    if wanted not in spoken:
        raise ValueError(f"language: found a record in {', '.join(spoken)}; expected {language!r} among them")
    own = {"language": wanted} | spoken.pop(wanted)
    return own, spoken


def records_of(row: Mapping[str, Any], vocabulary: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return the records of single edits in a record, with `prompt` and `target`; the record itself if it is one."""
    if tuple(vocabulary) == ("requested_rewrite",):
        return [*_of_rewrites(row)]
    if tuple(vocabulary) == ("edit",):
        return [_of_edit(row)]
    if tuple(vocabulary) == ("input", "alternatives"):
        return [_of_alternatives(row)]
    return [row]


def _of_alternatives(row: Mapping[str, Any]) -> Fields:
    """Return a record of MEND: its target is the first alternative, and its output is the answer before the edit."""
    rest = {name: value for name, value in row.items() if name not in ("input", "alternatives", "output")}
    first, *others = right_answers(row["alternatives"], "alternatives") or ("",)
    before = row.get("output") if not is_absent(row.get("output")) else row.get("prediction")
    return rest | {"prompt": row["input"], "target": first, "ground_truth": before, "other alternatives": others}


# ---------------------------------------------------------------------- CounterFact, MQuAKE, AKEW


def _of_rewrites(row: Mapping[str, Any]) -> Iterator[Fields]:
    """Yield a record per rewrite; the last one has the questions, since their answers follow from all rewrites."""
    rewrites = unpacked(row["requested_rewrite"])
    rewrites = rewrites if isinstance(rewrites, (list, tuple)) and rewrites else [rewrites]
    records = [_of_rewrite(rewrite) for rewrite in rewrites]
    *hops, rest = _single_hops(row, records)
    of_record = {name: value for name, value in row.items() if name not in NOT_OF_THE_RECORD}
    last = records[-1]
    neighbours = unpacked(row.get("neighborhood_prompts"))
    if not is_absent(neighbours) and not is_absent(last.get("ground_truth")):
        neighbours = neighbours if isinstance(neighbours, (list, tuple)) else [neighbours]
        of_record |= {
            "neighborhood_prompts": neighbours,
            "neighborhood_answers": [last["ground_truth"]] * len(neighbours),
        }
    questions = unpacked(row.get("questions"))
    if not is_absent(questions):
        right = [row.get(name) for name in ("new_answer", "new_answer_alias", "new_answer_extended")]
        questions = questions if isinstance(questions, (list, tuple)) else [questions]
        asked = [{"prompt": question, "answer": right, "kind": "multi_hop"} for question in questions]
        of_record["portability"] = [*asked, *_listed(of_record.get("portability"))]
    if rest:
        of_record["locality"] = [*_listed(of_record.get("locality")), *rest]
    for record, aliases in zip(records, hops, strict=True):
        record["aliases"] = [record.pop("aliases", None), aliases]
    yield from records[:-1]
    own = set(of_record) & set(last)
    yield last | {name: value for name, value in of_record.items() if name not in own or is_absent(last[name])}


# the questions, their answers after the edit and before it, and the hops that lead there
NOT_OF_THE_RECORD = (
    *("requested_rewrite", "questions", "new_answer", "new_answer_alias", "new_answer_extended"),
    *("answer", "answer_alias", "answer_extended", "single_hops", "new_single_hops"),
)
EXPECTED_REWRITE = "expected prompt (with {} for the subject), subject, target_new.str and target_true.str, all text"


def _of_rewrite(rewrite: Any) -> Fields:
    found = ValueError(f"field 'requested_rewrite': found {reprlib.repr(rewrite)}; {EXPECTED_REWRITE}")
    if not isinstance(rewrite, Mapping):
        raise found
    fields = dict(rewrite)
    subject, template = fields.pop("subject", None), fields.pop("prompt", None)
    whole = fields.pop("prompt_full", None)
    new, old = fields.pop("target_new", None), fields.pop("target_true", None)
    new, old = fields.pop("answer_new", None) if is_absent(new) else new, old or fields.pop("answer_true", None)
    long = fields.pop("fact_new_uns", None)
    if not isinstance(template, str) or ("{}" in template and not isinstance(subject, str)):
        template = whole
    right = right_answers(new, "requested_rewrite.target_new")
    if not isinstance(template, str) or (not right and is_absent(long)):
        raise found
    question, prompt = fields.pop("question", None), template.replace("{}", str(subject))
    record: Fields = {f"requested_rewrite.{name}": value for name, value in fields.items()}
    record |= {
        "prompt": prompt,
        "target": right[0] if is_absent(long) else long,
        "aliases": right[1:] if is_absent(long) else None,
        "subject": subject,
        "ground_truth": old,
        "relation": record.pop("requested_rewrite.relation_id", None),
        "rephrasings": [each for each in (question, whole) if not is_absent(each) and same_text(each) != prompt],
        "sub_questions": [],
    }
    for name in ("unsfact_triplets_GPT", "unsfact_triplets"):
        record["sub_questions"] += _listed(record.pop(f"requested_rewrite.{name}", None))
    if not is_absent(long) and right:
        asked = prompt if is_absent(question) else question
        record["sub_questions"] = [{"prompt": asked, "answer": right}, *record["sub_questions"]]
    return record


def _single_hops(row: Mapping[str, Any], records: Sequence[Fields]) -> list[Any]:
    """Return the aliases of each rewrite's target among the hops, and then probes of the hops that are not edited."""
    aliases: list[Any] = [[] for _ in records]
    wordings = [{same_text(each) for each in (record["prompt"], *record["rephrasings"])} for record in records]
    rest: dict[str, Fields] = {}
    for name in ("new_single_hops", "single_hops"):
        for hop in _listed(row.get(name)):
            if not isinstance(hop, Mapping):
                raise ValueError(
                    f"field {name!r}: found {reprlib.repr(hop)}; expected records with question and answer"
                )
            asked = [hop[each] for each in ("question", "cloze", "prompt") if not is_absent(hop.get(each))]
            right = right_answers([hop.get("answer"), hop.get("answer_alias")], name)
            edited = [number for number, known in enumerate(wordings) if known & set(map(same_text, asked))]
            for number in edited:
                if right[:1] == right_answers(records[number]["target"], "target"):
                    aliases[number] += right[1:]
            for prompt in [] if edited else asked:
                rest.setdefault(same_text(prompt), {"prompt": prompt, "answer": right, "kind": "single_hop"})
    return [*aliases, list(rest.values())]


def _listed(value: Any) -> list[Any]:
    value = unpacked(value)
    return [] if is_absent(value) else list(value) if isinstance(value, (list, tuple)) else [value]


# ---------------------------------------------------------------------- RippleEdits, UniEdit


def _of_edit(row: Mapping[str, Any]) -> Fields:
    """Return a record whose edit stands in a field, with its target (UniEdit) or as a sentence (RippleEdits)."""
    edit = unpacked(row["edit"])
    rest = {name: value for name, value in row.items() if name != "edit"}
    if not isinstance(edit, Mapping):
        raise ValueError(f"field 'edit': found {reprlib.repr(edit)}; expected a record with prompt and target")
    named = _named(edit)
    found = vocabularies(named.keys())
    if len(found) != 1:
        return rest | _of_sentence(named, rest)
    prompt, target = found[0]
    read = {prompt, target, "property", "tail_entity"}
    fields = {name: each for name, each in named.items() if name not in read}
    tail = named.get("tail_entity")
    value = tail.get("value") if isinstance(tail, Mapping) else None
    for name in ("generality", "locality"):
        if isinstance(rest.get(name), Mapping):
            rest[name] = {key: _with_path_kind(each) for key, each in rest[name].items()}
    return rest | fields | {
        "prompt": named[prompt],
        "target": named[target],
        "aliases": value.get("aliases") if isinstance(value, Mapping) else named.get("aliases"),
        "relation": _label(named.get("property")) or named.get("relation"),
    }  # fmt: skip


LOCALITY_KINDS = {"head of edit": "same_subject", "property of edit": "same_relation", "tail of edit": "same_object"}


def _with_path_kind(probe: Any) -> Any:
    """Return a probe of UniEdit with its kind: what it starts from, or how its chain of facts is built."""
    if not isinstance(probe, Mapping) or "path_type" not in probe:
        return probe
    if "loc_type" in probe:
        return {**probe, "kind": LOCALITY_KINDS.get(str(probe["loc_type"]), "unrelated")}
    paths = probe.get("paths") or [[]]
    num_facts = sum(len(path) - sum(mark in ("b", "m") for mark in path) for path in paths) // 2
    kind = "multi_hop" if num_facts > 1 else "reversed" if any("b" in path for path in paths) else ""
    return {**probe, "kind": "same_entity" if probe["path_type"] == "double" else kind}


def _label(value: Any) -> Any:
    return next((value[key] for key in ANSWER_KEYS if key in value), None) if isinstance(value, Mapping) else value


def _of_sentence(edit: Mapping[str, Any], tests: Mapping[str, Any]) -> Fields:
    """Return the fields of "The name of the capital of Peru is Lima." as a prompt and a target.

    The target is not given. The sentence before the edit begins in the same way; without one, the target is the
    longest answer of a test that ends the sentence, or what stands behind the last "is".
    """
    sentence = text(edit.get("prompt"), "edit.prompt").strip().rstrip(".")
    before = edit.get("previous_fact")
    old = before.get("prompt") if isinstance(before, Mapping) else None
    start = -1
    if isinstance(old, str):
        start = _common_start(sentence, old.strip()).rfind(" is ")
    if start < 0:
        ends = [each for right in _answers_in(tests) for each in right if sentence.endswith(f" {each}")]
        start = len(sentence) - len(max(ends, key=len)) - len(" is ") if ends else sentence.rfind(" is ")
    if start < 0:
        raise ValueError(f"field 'edit.prompt': found {sentence!r}; expected a sentence such as 'The … of … is …'")
    prompt, target = sentence[: start + len(" is")].rstrip(), sentence[start + len(" is ") :]
    relation = edit.get("relation")
    words = f" {str(relation).replace('_', ' ').casefold()} of "
    place = prompt.casefold().find(words)
    return {
        "prompt": prompt,
        "target": target,
        "aliases": [others for first, *others in _answers_in(tests) if first == target],
        "ground_truth": old.strip().rstrip(".")[start + len(" is ") :] if isinstance(old, str) else None,
        "relation": relation,
        "subject": prompt[place + len(words) : -len(" is")] if place >= 0 else None,
    }


def _common_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def _answers_in(value: Any) -> Iterator[tuple[str, ...]]:
    """Yield each answer in nested tests, with its aliases."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            if name in ("answers", "targets", "answer"):
                yield from filter(None, (right_answers(answer, name) for answer in _listed(each)))
            else:
                yield from _answers_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _answers_in(each)
