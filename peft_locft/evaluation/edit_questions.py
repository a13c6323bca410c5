"""What a model is asked about its edits, and what it replies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ..data.edits import Edit
from ..data.encoding import encode_edits, encode_prompts
from ..engine.questions import STOPS, Answer, Continuation, Question, Score
from .scoring import cut_answer

Kind = Literal["reliability", "generalization", "locality", "portability"]
GUESSED = 8  # tokens of an earlier answer that the next is guessed to begin with


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt that is asked because of one edit.

    Args:
        edit: the number of the edit.
        kind: what the reply tells.
        prompt: what is asked.
        expected: the right answer: the edit's target, or a probe's own answer; `None` where none is known.
        other: what must be less probable than `expected`: the answer before the edit; for locality, the edit's target.
    """

    edit: int
    kind: Kind
    prompt: str
    expected: str | None
    other: str | None

    @property
    def num_stops(self) -> int:
        """Stops that an answer with all of `expected` in it ends behind."""
        return 1 + sum(letter in STOPS for letter in self.expected or "")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model says to an item.

    Args:
        text: its greedy answer, up to the first stop; `None` if it was not asked for.
        long_text: the same, up to the stop behind an expected answer that has stops in it.
        token_ids: the answer as generated.
        expected: how probable the expected answer's tokens are to it.
        expected_ids: these tokens.
        other: the same of the other answer.
    """

    text: str | None = None
    long_text: str | None = None
    token_ids: tuple[int, ...] = ()
    expected: Score | None = None
    expected_ids: tuple[int, ...] = ()
    other: Score | None = None


def items_of(edits: Sequence[Edit]) -> list[Item]:
    """Return all that edits say how to ask, edit by edit."""
    return [item for number, edit in enumerate(edits) for item in _items(number, edit)]


def _items(number: int, edit: Edit) -> Iterator[Item]:
    yield Item(number, "reliability", edit.prompt, edit.target, edit.ground_truth)
    for rephrasing in edit.rephrasings:
        yield Item(number, "generalization", rephrasing, edit.target, edit.ground_truth)
    for probe in edit.locality:
        yield Item(number, "locality", probe.prompt, probe.answer, edit.target)
    for probe in edit.portability:
        yield Item(number, "portability", probe.prompt, probe.answer, None)


class ItemEncoder:
    """Turns items into questions, and answers into replies.

    Args:
        items: what is asked.
        tokenizer: the model's; left as it is.
        chat_template: as in `encode_edits`.
        generate: ask for answers.
        score: ask how probable `expected` is.
        compare: ask how probable `other` is, too.
        max_new_tokens: in an answer at most.
    """

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool = False,
        generate: bool = True,
        score: bool = True,
        compare: bool = True,
        max_new_tokens: int = 32,
    ) -> None:
        self.items = items
        self.tokenizer = tokenizer
        self._by_prompt: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            self._by_prompt.setdefault(item.prompt, []).append(number)
        encoded = encode_prompts(list(self._by_prompt), tokenizer, chat_template=chat_template)
        self._prompts = dict(zip(self._by_prompt, map(tuple, encoded), strict=True))
        self._generate, self._score, self._compare = generate, score, compare
        self._max_new_tokens = max_new_tokens if generate else 0
        pairs = {(item.prompt, text) for item in items for text in (item.expected, item.other) if text}
        self._continuations = self._encode(sorted(pairs), chat_template)

    def _encode(self, pairs: Sequence[tuple[str, str]], chat_template: bool) -> dict[tuple[str, str], Continuation]:
        if not pairs:
            return {}
        edits = [Edit(prompt=prompt, target=text, source=repr(prompt)) for prompt, text in pairs]
        with warnings.catch_warnings():
            # a token that prompt and target share is scored, here as in training, where it is warned of
            warnings.filterwarnings("ignore", message=".*share, as .* edits have")
            encoded = encode_edits(edits, self.tokenizer, append_eos=False, chat_template=chat_template)
        rows = (encoded[number] for number in range(len(encoded)))
        return {
            pair: Continuation(tuple(row.input_ids.tolist()), row.target_start)
            for pair, row in zip(pairs, rows, strict=True)
        }

    def questions(self, earlier: Sequence[Reply] | None = None) -> list[Question]:
        """Return a question for each distinct prompt.

        Args:
            earlier: replies of another model, of which those to locality probes are guessed to be copies.
        """
        return [
            Question(
                self._prompts[prompt],
                tuple(self._continuations[prompt, text] for text in texts),
                next((guess for number in numbers if (guess := self._guess(number, earlier))), ()),
                max(self.items[number].num_stops for number in numbers),
                self._max_new_tokens,
            )
            for prompt, numbers in self._by_prompt.items()
            for texts in [self._scored(prompt)]
        ]

    def _guess(self, number: int, earlier: Sequence[Reply] | None) -> tuple[int, ...]:
        item = self.items[number]
        prompt = self._prompts[item.prompt]
        if not self._generate:
            return ()
        if item.kind == "locality" and earlier is not None:
            return earlier[number].token_ids[:GUESSED]
        if item.expected is None:
            return ()
        expected = self._continuations[item.prompt, item.expected].token_ids
        return expected[len(prompt) :] if expected[: len(prompt)] == prompt else ()

    def _scored(self, prompt: str) -> list[str]:
        """Return the texts whose probability is asked for after a prompt, each once."""
        items = [self.items[number] for number in self._by_prompt[prompt]]
        wanted = [item.expected for item in items if self._score or self._compare]
        wanted += [item.other for item in items if self._compare]
        return list(dict.fromkeys(text for text in wanted if text))

    def replies(self, answers: Sequence[Answer]) -> list[Reply]:
        """Read the answers to `questions`; return a reply to each item."""
        by_prompt = dict(zip(self._by_prompt, answers, strict=True))
        scores = {
            (prompt, text): score
            for prompt, answer in by_prompt.items()
            for text, score in zip(self._scored(prompt), answer.scores, strict=True)
        }
        return [self._reply(item, by_prompt[item.prompt], scores) for item in self.items]

    def _reply(self, item: Item, answer: Answer, scores: dict[tuple[str, str], Score]) -> Reply:
        text = long_text = None
        if self._generate:
            generated = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            text, long_text = cut_answer(generated).strip(), cut_answer(generated, item.num_stops).strip()
        expected_ids: tuple[int, ...] = ()
        if item.expected is not None:
            continuation = self._continuations[item.prompt, item.expected]
            expected_ids = continuation.token_ids[continuation.start :]
        expected, other = (scores.get((item.prompt, each)) if each else None for each in (item.expected, item.other))
        return Reply(text, long_text, tuple(answer.token_ids), expected, expected_ids, other)
