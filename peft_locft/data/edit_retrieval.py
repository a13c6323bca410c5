"""A memory of edits that no weight holds: the nearest edit is read to the model before the prompt."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from .augmentation import as_sentence
from .edits import Edit
from .joining import TargetSeparator
from .scripts import find_word, words


class EditRetrieval:
    """Puts the edit nearest to a prompt before it, as a sentence: a baseline that trains nothing.

    The nearest edit is the one whose prompt has the largest cosine with the text, of word counts weighted by
    `log((1 + N) / (1 + df)) + 1` (N edits, df of them have the word), as in scikit-learn's TfidfVectorizer. Of equal
    ones it is the first.

    Args:
        edits: the edits to remember.
        subject_gate: use an edit only if its subject occurs in the text; an edit without a subject is then never used.
        target_separator: what stands between an edit's prompt and target, as in `encode_edits`.

    Example:
        >>> remember = EditRetrieval([Edit("The capital of France is", "Lyon", subject="France")], subject_gate=True)
        >>> remember("France's capital city is")
        "The capital of France is Lyon. France's capital city is"
        >>> remember("The capital of Spain is")
        'The capital of Spain is'
    """

    def __init__(
        self, edits: Sequence[Edit], *, subject_gate: bool = False, target_separator: TargetSeparator = "auto"
    ) -> None:
        self.edits = list(edits)
        self.subject_gate = subject_gate
        self.target_separator = target_separator
        counts = [_words(edit.prompt) for edit in self.edits]
        found_in = Counter(word for each in counts for word in each)
        self._weights = {word: math.log((1 + len(counts)) / (1 + df)) + 1 for word, df in found_in.items()}
        self._by_word: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, each in enumerate(counts):
            weighted = {word: count * self._weights[word] for word, count in each.items()}
            length = math.sqrt(sum(weight**2 for weight in weighted.values()))
            for word, weight in weighted.items():
                self._by_word[word].append((number, weight / length))

    def nearest(self, text: str) -> Edit | None:
        """Return the nearest edit that may be used; `None`: none shares a word with the text."""
        cosines: dict[int, float] = defaultdict(float)
        for word, count in _words(text).items():
            for number, weight in self._by_word.get(word, ()):
                cosines[number] += count * self._weights[word] * weight
        if self.subject_gate:
            cosines = {number: each for number, each in cosines.items() if self._is_about(number, text)}
        return self.edits[min(cosines, key=lambda number: (-cosines[number], number))] if cosines else None

    def _is_about(self, number: int, text: str) -> bool:
        subject = self.edits[number].subject
        return subject is not None and find_word(text.casefold(), subject.casefold()) is not None

    def __call__(self, prompt: str) -> str:
        """Return the prompt with the nearest edit before it; the prompt as it is if there is none."""
        edit = self.nearest(prompt)
        return prompt if edit is None else as_sentence(edit, self.target_separator) + prompt

    def __str__(self) -> str:
        gate = ", if its subject occurs in the prompt" if self.subject_gate else ""
        return f"the nearest of {len(self.edits)} edits by TF-IDF stands before it{gate}"


def _words(text: str) -> Counter[str]:
    return Counter(word for word in words(text.casefold()) if any(map(str.isalnum, word)))
