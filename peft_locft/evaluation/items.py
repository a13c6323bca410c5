"""The prompts that evaluate edits, and a model's replies to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.chat import ChatWriter, in_forms
from ..data.edits import Edit, Message, Prompt
from ..data.encoding import encode_edits, encode_prompts
from ..engine.questions import STOPS, UNTIL_EOS, Answer, Continuation, Question, Score, without_thoughts
from .scoring import cut_answer

NUM_GUESSED_TOKENS = 8  # of an earlier answer, as a guess at how the next one begins
TOKENS_BESIDE_ANSWER = 6  # that an answer may have beside the longest of its choices, or the expected one


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One prompt that evaluates one edit.

    Args:
        edit: index of the edit.
        kind: what the reply measures, a name in `kinds.ALL_KINDS`.
        prompt: the text given to the model.
        expected: the right answer: the edit's target, or the probe's own answer; `None` if none is known.
        other: an answer that must be less probable than `expected`: the one before the edit; for locality, the edit's
            target.
        history: the messages of a conversation before the prompt; `None`: the prompt is plain text.
        aliases: other right answers; the best over all counts where the text of an answer is compared.
        choices: the possible answers, `expected` among them; `()`: any.
        max_new_tokens: longest answer, unless the expected one needs more; `None`: as the encoder says or, with
            choices, little more than the longest.
        is_whole: the answer ends with EOS only, not at a stop.
        language: the code of the prompt's language; `None`: that of the edit.
    """

    edit: int
    kind: str
    prompt: str
    expected: str | None
    other: str | None
    history: tuple[Message, ...] | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    is_whole: bool = False
    language: str | None = None

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The expected answer and its aliases; `()` if none is known."""
        return () if self.expected is None else (self.expected, *self.aliases)

    @property
    def asked(self) -> Prompt:
        """The prompt with the messages before it."""
        return Prompt(self.prompt, self.history)

    @property
    def num_stops(self) -> int:
        """Number of stops after which an answer that contains all of any right answer ends."""
        if self.is_whole:
            return UNTIL_EOS
        return 1 + max((len(STOPS.findall(right)) for right in self.right_answers), default=0)


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply to an item.

    Args:
        text: greedy answer, cut at the first stop unless the item is whole; `None` if nothing was generated.
        long_text: greedy answer, cut at stop number `num_stops` of the item.
        token_ids: greedy answer as generated.
        expected: score of the expected answer's tokens; `None` if it was not scored.
        expected_ids: the expected answer's tokens.
        other: score of the other answer's tokens; `None` if it was not scored.
        choices: scores of the item's choices; `()` if they were not scored.
        similarity: of the meaning of a whole answer and the expected one; `None` if it was not computed.
    """

    text: str | None = None
    long_text: str | None = None
    token_ids: tuple[int, ...] = ()
    expected: Score | None = None
    expected_ids: tuple[int, ...] = ()
    other: Score | None = None
    choices: tuple[Score, ...] = ()
    similarity: float | None = None


def eval_items(edits: Sequence[Edit], chat_template: bool | str = "off") -> list[EvalItem]:
    """Return the items of all edits, edit by edit: the prompt, rephrasings, locality and portability probes,
    and questions in other languages.

    Args:
        edits: the edits.
        chat_template: `"on"`, `"off"` or `"both"`: every prompt as text, in a conversation, or once in each.
    """
    forms = ((number, form) for number, edit in enumerate(edits) for form in in_forms([edit], chat_template))
    return [item for number, form in forms for item in _items_of_edit(number, form)]


def _items_of_edit(number: int, edit: Edit) -> Iterator[EvalItem]:
    history = edit.history
    yield EvalItem(number, "reliability", edit.prompt, edit.target, edit.ground_truth, history, edit.aliases)
    for rephrasing in edit.rephrasings:
        yield EvalItem(number, "generalization", rephrasing, edit.target, edit.ground_truth, history, edit.aliases)
    for probe in edit.locality:
        yield EvalItem(
            number,
            "locality",
            probe.prompt,
            probe.answer,
            edit.target,
            history,
            probe.aliases,
            language=probe.language,
        )
    for kind in ("portability", "cross_lingual"):
        for probe in getattr(edit, kind):
            answer = (probe.answer, None, history, probe.aliases)
            yield EvalItem(number, kind, probe.prompt, *answer, language=probe.language)


class ItemEncoder:
    """Encodes items as questions to a model, and decodes its answers to replies.

    Args:
        items: the items.
        tokenizer: the model's tokenizer; not changed.
        chat_template_kwargs: as in `encode_edits`.
        target_separator: as in `encode_edits`.
        generate: generate answers.
        score: score `expected`.
        compare: score `expected`, `other` and `choices`.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        items: Sequence[EvalItem],
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        target_separator: str = "auto",
        generate: bool = True,
        score: bool = True,
        compare: bool = True,
        max_new_tokens: int = 32,
    ) -> None:
        self.items = items
        self.tokenizer = tokenizer
        self._template_kwargs = chat_template_kwargs or {}
        self._target_separator = target_separator
        self._by_prompt: dict[Prompt, list[int]] = {}
        for number, item in enumerate(items):
            self._by_prompt.setdefault(item.asked, []).append(number)
        encoded = encode_prompts(list(self._by_prompt), tokenizer, chat_template_kwargs=self._template_kwargs)
        self._prompts = dict(zip(self._by_prompt, map(tuple, encoded), strict=True))
        self._generate, self._score, self._compare = generate, score, compare
        self._max_new_tokens = max_new_tokens if generate else 0
        texts = ((item.asked, text) for item in items for text in (item.expected, item.other, *item.choices))
        pairs = dict.fromkeys((asked, text) for asked, text in texts if text)
        self._continuations = self._encode(list(pairs))

    @cached_property
    def _answer_mark(self) -> str | None:
        """The tag after which the chat template begins an answer."""
        prompt = next((prompt for prompt in self._by_prompt if prompt.history is not None), None)
        return None if prompt is None else ChatWriter(self.tokenizer, self._template_kwargs).answer_mark(prompt)

    def _encode(self, pairs: Sequence[tuple[Prompt, str]]) -> dict[tuple[Prompt, str], Continuation]:
        if not pairs:
            return {}
        edits = [
            Edit(prompt=prompt.text, target=text, history=prompt.history, source=repr(prompt.text))
            for prompt, text in pairs
        ]
        with warnings.catch_warnings():
            # as in training, a token that prompt and target share is scored; training warns of it
            warnings.filterwarnings("ignore", message=".*found a token shared by")
            warnings.filterwarnings("ignore", message=".*the tokenizer does not know a part of the target")
            encoded = encode_edits(
                edits,
                self.tokenizer,
                append_eos=False,
                chat_template_kwargs=self._template_kwargs,
                target_separator=self._target_separator,
            )
        rows = (encoded[number] for number in range(len(encoded)))
        return {
            pair: Continuation(tuple(row.input_ids.tolist()), row.target_start)
            for pair, row in zip(pairs, rows, strict=True)
        }

    def questions(self, earlier: Sequence[Reply] | None = None) -> list[Question]:
        """Return a question for each distinct prompt.

        Args:
            earlier: another model's replies; those to locality probes are used as guesses, which only saves time.
        """
        return [
            Question(
                self._prompts[prompt],
                tuple(self._continuations[prompt, text] for text in texts),
                next((guess for number in numbers if (guess := self._guess(number, earlier))), ()),
                max(self.items[number].num_stops for number in numbers),
                max(self._most_tokens(self.items[number]) for number in numbers),
            )
            for prompt, numbers in self._by_prompt.items()
            for texts in [self._scored(prompt)]
        ]

    def _most_tokens(self, item: EvalItem) -> int:
        """Return the largest number of tokens of an answer to an item; 0 if none is generated."""
        if not self._max_new_tokens or (item.max_new_tokens is None and not item.choices):
            return self._max_new_tokens
        # of an answer that is long by its nature, the expected one's length is no measure
        texts = [item.expected] if item.max_new_tokens is not None and not item.is_whole else [*item.choices]
        scored = (self._continuations[item.asked, text] for text in texts if text)
        needed = TOKENS_BESIDE_ANSWER + max((len(each.token_ids) - each.start for each in scored), default=0)
        return needed if item.max_new_tokens is None else max(item.max_new_tokens, needed)

    def _guess(self, number: int, earlier: Sequence[Reply] | None) -> tuple[int, ...]:
        item = self.items[number]
        prompt = self._prompts[item.asked]
        if not self._generate:
            return ()
        if item.kind.startswith("locality") and earlier is not None:
            return earlier[number].token_ids[:NUM_GUESSED_TOKENS]
        if item.expected is None:
            return ()
        expected = self._continuations[item.asked, item.expected].token_ids
        return expected[len(prompt) :] if expected[: len(prompt)] == prompt else ()

    def _scored(self, prompt: Prompt) -> list[str]:
        """Return the texts to score after a prompt, each once."""
        items = [self.items[number] for number in self._by_prompt[prompt]]
        texts = [item.expected for item in items if self._score or self._compare]
        texts += [text for item in items if self._compare for text in (item.other, *item.choices)]
        return list(dict.fromkeys(text for text in texts if text))

    def replies(self, answers: Sequence[Answer]) -> list[Reply]:
        """Return a reply to each item, from the answers to `questions`."""
        by_prompt = dict(zip(self._by_prompt, answers, strict=True))
        scores = {
            (prompt, text): score
            for prompt, answer in by_prompt.items()
            for text, score in zip(self._scored(prompt), answer.scores, strict=True)
        }
        return [self._reply(item, by_prompt[item.asked], scores) for item in self.items]

    def _reply(self, item: EvalItem, answer: Answer, scores: dict[tuple[Prompt, str], Score]) -> Reply:
        text = long_text = None
        expected_ids: tuple[int, ...] = ()
        # another item may ask for a longer answer to the same prompt
        token_ids = answer.token_ids[: self._most_tokens(item)]
        if item.expected is not None:
            continuation = self._continuations[item.asked, item.expected]
            expected_ids = continuation.token_ids[continuation.start :]
        if self._generate:
            mark = None if item.history is None else self._answer_mark
            generated = self._text_of(token_ids, item.expected, expected_ids, mark)
            long_text = cut_answer(generated, item.num_stops).strip()
            text = long_text if item.is_whole else cut_answer(generated).strip()
        expected, other = (scores.get((item.asked, each)) if each else None for each in (item.expected, item.other))
        choices = tuple(scores[item.asked, each] for each in item.choices) if self._compare else ()
        return Reply(text, long_text, tuple(token_ids), expected, expected_ids, other, choices)

    def _after(self, mark: str, token_ids: Sequence[int]) -> Sequence[int]:
        """Return the tokens behind the last tag after which the template begins an answer; all without one."""
        if mark not in self.tokenizer.decode(token_ids):
            return token_ids
        lengths = range(len(token_ids), 0, -1)
        last = next(n for n in lengths if self.tokenizer.decode(token_ids[:n]).rstrip().endswith(mark))
        return token_ids[last:]

    def _text_of(
        self, token_ids: Sequence[int], expected: str | None, expected_ids: Sequence[int], mark: str | None
    ) -> str:
        """Return an answer's text; if it begins with the expected answer's tokens, with the expected answer.

        Some tokenizers do not give back the text: they put spaces between words, or know no capitals. Thoughts and
        headers before the answer are left out.
        """
        answered = self._after(mark, token_ids) if mark else token_ids
        generated = without_thoughts(str(self.tokenizer.decode(answered, skip_special_tokens=True)))
        if not expected or expected in generated:
            return generated
        given_back = str(self.tokenizer.decode(expected_ids, skip_special_tokens=True)).strip()
        rest = generated.strip().removeprefix(given_back)
        return expected + rest if given_back and rest != generated.strip() else generated
