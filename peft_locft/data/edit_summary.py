"""What was understood of edits: how many of each kind there are, examples, conflicts, and what was left out."""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .edit_files import READ_SUFFIXES
from .edit_types import PROBE_FIELDS, Edit, Probe, prompt_identity, same_text
from .edits import EditSource, OnConflict, read_with_left_out, settle_conflicts

NUM_EXAMPLES = 3
MAX_NAMED = 5  # conflicts in a message
MAX_SHOWN = 100  # characters of a text


@dataclass(frozen=True, slots=True)
class EditSummary:
    """What was understood of edits, from [`summarize_edits`][peft_locft.data.summarize_edits].

    Attributes:
        name: of the source.
        edits: the edits, merged and settled.
        num_read: number of edits before those with the same prompt and target were merged.
        conflicts: the edits of each prompt that had several targets.
        left_out: how many records have a field that looks like a part of an edit and was not read, by its name.
    """

    name: str
    edits: list[Edit]
    num_read: int
    conflicts: list[list[Edit]]
    left_out: dict[str, int]

    @property
    def num_probes(self) -> dict[str, dict[str, int]]:
        """Number of probes by field and kind; a kind that the data set does not say is `""`."""
        probes = {name: [probe for edit in self.edits for probe in getattr(edit, name)] for name in PROBE_FIELDS}
        return {
            name: dict(Counter(each.kind for each in found).most_common()) for name, found in probes.items() if found
        }

    @property
    def languages(self) -> dict[str, int]:
        """Number of edits and probes by language, where it is said."""
        said = Counter(edit.language for edit in self.edits if edit.language)
        said.update(probe.language for probe in self._probes() if probe.language)
        return dict(said.most_common())

    def _probes(self) -> Iterator[Probe]:
        for edit in self.edits:
            for name in PROBE_FIELDS:
                yield from getattr(edit, name)

    def __str__(self) -> str:
        return "\n".join([*self._counts(), *self._said_of_the_rest(), "", *self._examples()])

    def _counts(self) -> Iterator[str]:
        merged = self.num_read - len(self.edits)
        repeats = f", after merging {_counted(merged, 'repeat')}" if merged else ""
        yield f"{self.name}: {_counted(len(self.edits), 'edit')}{repeats}"
        for name in ("rephrasings", "paraphrases", "aliases"):
            number = sum(len(getattr(edit, name)) for edit in self.edits)
            if number:
                yield f"  {name}: {number}"
        for name, by_kind in self.num_probes.items():
            kinds = ", ".join(f"{number} {kind or 'of no named kind'}" for kind, number in by_kind.items())
            unknown = sum(probe.answer is None for edit in self.edits for probe in getattr(edit, name))
            without = f"; {unknown} without an answer" if unknown else ""
            several = sum(bool(probe.aliases) for edit in self.edits for probe in getattr(edit, name))
            with_several = f"; {several} with several right answers" if several else ""
            yield f"  {name}: {sum(by_kind.values())} ({kinds}{with_several}{without})"
        for name in ("subject", "relation", "ground_truth"):
            number = sum(getattr(edit, name) is not None for edit in self.edits)
            if number:
                yield f"  {name}: of {number} edits"

    def _said_of_the_rest(self) -> Iterator[str]:
        languages = ", ".join(f"{code} {number}" for code, number in self.languages.items())
        yield f"  languages of edits and probes: {languages or 'not said'}"
        number = len(self.conflicts)
        yield f"  conflicts: {f'prompts with several targets: {number}' if number else 'none'}"
        for group in self.conflicts[:MAX_NAMED]:
            targets = ", ".join(f"{_shown(edit.target)} ({edit.source})" for edit in group)
            yield f"    {_shown(group[0].prompt)}: {targets}"
        yield f"  left out: {'nothing' if not self.left_out else ''}".rstrip()
        for name, number in self.left_out.items():
            yield f"    {name}, in {_counted(number, 'record')}"

    def _examples(self) -> Iterator[str]:
        chosen = examples_of(self.edits)
        yield f"{len(chosen)} examples:" if len(chosen) > 1 else "An example:"
        for edit in chosen:
            before = f"; before: {_shown(edit.ground_truth)}" if edit.ground_truth else ""
            yield f"  {edit.source}"
            yield f"    {_shown(edit.prompt)} -> {_answers(edit.right_answers)}{before}"
            for rephrasing in edit.rephrasings[:1]:
                yield f"    rephrasings[0]: {_shown(rephrasing)}"
            for name in PROBE_FIELDS:
                for probe in getattr(edit, name)[:1]:
                    about = ", ".join(filter(None, (probe.kind, probe.language)))
                    place = f"{name}[0] ({about})" if about else f"{name}[0]"
                    yield f"    {place}: {_shown(probe.prompt)} -> {_answers(probe.right_answers)}"


def examples_of(edits: Sequence[Edit]) -> list[Edit]:
    """Return the first edit, one from the middle, and the last."""
    places = dict.fromkeys((0, len(edits) // 2, len(edits) - 1))
    return [edits[place] for place in places][:NUM_EXAMPLES]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _answers(right: Sequence[str]) -> str:
    others = [f"{len(right) - 3} others"] if len(right) > 3 else []
    return " or ".join([*map(_shown, right[:3]), *others]) or "unknown"


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…")


def summarize_edits(
    source: EditSource, *, split: str = "train", language: str | None = None, on_conflict: OnConflict = "warn"
) -> EditSummary:
    """Read edits and say what was understood of them.

    Args:
        source: whatever `read_edits` reads, or a folder of such files.
        split: as in `read_edits`.
        language: as in `read_edits`.
        on_conflict: what to do with prompts that have several targets: `"warn"`: keep all, and list them. `"last"`:
            keep the last, and list all. `"error"`: raise an error.

    Returns:
        The edits and what is known of them; `print` shows it.

    Raises:
        FileNotFoundError: as `read_edits`.
        ValueError: as `read_edits`, or if a folder holds no file of edits.

    Example:
        >>> print(summarize_edits("edits.csv"))
        edits.csv: 100 edits
          rephrasings: 100
          …
    """
    edits: list[Edit] = []
    left_out: Counter[str] = Counter()
    for each in _sources(source):
        found, of_one = read_with_left_out(each, split, language)
        edits += found
        left_out.update(of_one)
    groups: dict[object, dict[str, Edit]] = {}
    for edit in edits:
        groups.setdefault(prompt_identity(edit), {}).setdefault(same_text(edit.target), edit)
    return EditSummary(
        name=_name(source),
        edits=settle_conflicts(edits, "keep" if on_conflict == "warn" else on_conflict),
        num_read=len(edits),
        conflicts=[list(group.values()) for group in groups.values() if len(group) > 1],
        left_out=dict(left_out),
    )


def _sources(source: EditSource) -> list[EditSource]:
    """Return the files of a folder, by name; or the source itself."""
    if not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return [source]
    held = sorted(Path(source).iterdir())
    files = [each for each in held if each.name.lower().removesuffix(".gz").endswith(READ_SUFFIXES)]
    # the folder of a model or an adapter is refused, as by `read_edits`
    is_other = any((Path(source) / name).is_file() for name in ("config.json", "adapter_config.json"))
    return [source] if is_other or not files else [*files]


def _name(source: EditSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).name or str(source)
    return "edits" if not isinstance(source, Edit) else reprlib.repr(source.prompt)
