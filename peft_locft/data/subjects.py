"""The subjects of edits that name none: the base model copies each out of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..engine.decoding import generate_and_score
from ..engine.model_state import as_base, max_length
from ..engine.preparations import Preparations
from ..engine.questions import Question
from .edits import Edit
from .scripts import begins_word, ends_word

# statements and questions with the subject at the beginning, in the middle and at the end; none is of a data set
EXAMPLES = (
    ("Where was Albert Einstein born?", "Albert Einstein"),
    ("Kenya's largest city is", "Kenya"),
    ("Marie Curie, a pioneer of", "Marie Curie"),
    ("Which material is the Eiffel Tower made of?", "Eiffel Tower"),
    ("The head of the company that makes the Toyota Corolla is", "Toyota Corolla"),
    ("In what year was Casablanca first shown in cinemas?", "Casablanca"),
    ("La moneda del Perú es", "Perú"),
    ("What was the name of the mother of Louis XIV?", "Louis XIV"),
    ("Goethe's most famous work is", "Goethe"),
    ("The river that flows through London is the", "London"),
    ("What kind of animal is Moby Dick?", "Moby Dick"),
    ("The Beatles first played in", "The Beatles"),
)
HEAD = "What each text is about, copied from the text.\n\n"
LONGEST = 32  # tokens of a subject


def find_subjects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit],
    *,
    preparations: Preparations | None = None,
) -> list[str | None]:
    """Return what each edit is about: its own subject, or else the words of its prompt that the base model copies.

    The base reads twelve examples and the prompt, and decodes greedily; only words that follow each other in the
    prompt are allowed, from the beginning of a word to the end of one.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer, a fast one.
        edits: the edits.
        preparations: stores what is found for later calls.

    Returns:
        The subjects; `None` where the prompt does not fit the model's positions, or has no word.

    Example:
        >>> find_subjects(model, tokenizer, [Edit("The capital of France is", "Lyon")])
        ['France']
    """
    subjects = [edit.subject for edit in edits]
    texts = {edit.prompt: None for edit in edits if not edit.subject}
    spans = [span for text in texts if (span := _Copied.of(text, tokenizer, max_length(model)))]
    found = _copied(model, tokenizer, spans, preparations or Preparations(model)) if spans else {}
    return [subject or found.get(edit.prompt) for subject, edit in zip(subjects, edits, strict=True)]


@dataclass
class _Copied:
    """A question for the subject of a text, and which of its tokens may be copied.

    Args:
        text: the text.
        token_ids: of the whole question.
        places: begin and end of those tokens in the text, in characters, that lie inside of it; by their index.
    """

    text: str
    token_ids: tuple[int, ...]
    places: dict[int, tuple[int, int]]
    chosen: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase, most: int | None) -> _Copied | None:
        """Return the question for a text, with as many examples as fit; `None` if none fits, or it has no word."""
        counts = (len(EXAMPLES), len(EXAMPLES) // 3, 1, 0)
        return next((question for num in counts if (question := cls._with_examples(text, tokenizer, most, num))), None)

    @classmethod
    def _with_examples(
        cls, text: str, tokenizer: PreTrainedTokenizerBase, most: int | None, num: int
    ) -> _Copied | None:
        shown = "".join(f"Text: {example}\nAbout: {subject}\n\n" for example, subject in EXAMPLES[:num])
        before = f"{HEAD}{shown}Text: "
        encoded = tokenizer(f"{before}{text}\nAbout:", return_offsets_mapping=True, verbose=False)
        begin, end = len(before), len(before) + len(text)
        places = {
            index: (max(first, begin) - begin, last - begin)
            for index, (first, last) in enumerate(encoded["offset_mapping"])
            if max(first, begin) < last <= end
        }
        ids = tuple(encoded["input_ids"])
        question = cls(text, ids, places)
        if most is not None and len(ids) + LONGEST + 1 > most:
            return None
        return question if any(map(question._begins_word, places)) else None

    def copies(self, copied: Sequence[int]) -> list[int]:
        """Return the indices of the last tokens of all places in the text where `copied` stands as words begin."""
        return [
            index + len(copied) - 1
            for index in self.places
            if self._begins_word(index)
            and self.token_ids[index : index + len(copied)] == tuple(copied)
            and index + len(copied) - 1 in self.places
        ]

    def allowed(self, end_id: int) -> list[int]:
        """Return the tokens that may come next."""
        if not self.chosen:
            return [self.token_ids[index] for index in self.places if self._begins_word(index)]
        last = self.copies(self.chosen)
        following = [self.token_ids[index + 1] for index in last if index + 1 in self.places]
        return following + [end_id] * (not following or any(map(self._ends_word, last)))

    def subject(self) -> str:
        """Return the words that were copied."""
        last = self.copies(self.chosen)[0]
        return self.text[self.places[last - len(self.chosen) + 1][0] : self.places[last][1]].strip()

    def _begins_word(self, index: int) -> bool:
        begin, end = self.places[index]
        own = self.text[begin:end].lstrip()
        return own[:1].isalnum() and begins_word(self.text, end - len(own))

    def _ends_word(self, index: int) -> bool:
        return ends_word(self.text, self.places[index][1])


def _copied(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[_Copied], preparations: Preparations
) -> dict[str, str]:
    """Return the subjects of texts."""
    end_id = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
    questions = [Question(each.token_ids, max_new_tokens=LONGEST, sample=number) for number, each in enumerate(asked)]

    def choose(logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        tokens = []
        for row, (number, step) in zip(logits.float(), places, strict=True):
            own = asked[number]
            del own.chosen[step:]  # a question is asked again with fewer at once if memory runs out
            allowed = own.allowed(end_id)
            token = allowed[int(row[allowed].argmax())]
            own.chosen.extend([token] if token != end_id else [])
            tokens.append(token)
        return torch.tensor(tokens, device=logits.device)

    def ask() -> dict[str, str]:
        with as_base(model):
            generate_and_score(
                model,
                tokenizer,
                questions,
                choose=preparations.counted(choose),
                label="the base",
                progress=False,
                stops="\n",
            )
        return {each.text: each.subject() for each in asked}

    found: dict[str, str] = preparations.stored(["subjects", [each.token_ids for each in asked]], ask)
    return found
