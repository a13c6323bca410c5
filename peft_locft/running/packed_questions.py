"""Questions as packed tokens: their beginnings as a tree, and whose logits are read for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .prefixes import PrefixTree
from .questions import Question


@dataclass(frozen=True)
class Branches:
    """The sequences of token ids of some questions, as a tree: each continuation, and prompt and guess last."""

    tree: PrefixTree
    lengths: list[int]
    of_question: list[range]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> Branches:
        rows: list[tuple[int, ...]] = []
        of_question = []
        for question in questions:
            first = len(rows)
            rows += [scored.token_ids for scored in question.scored]
            rows.append(question.prompt + question.guess)
            of_question.append(range(first, len(rows)))
        lengths = [len(row) for row in rows]
        # of every row the tree leaves out the last token, which predicts nothing: here, one that is not there
        tokens = torch.tensor([token for row in rows for token in (*row, 0)])
        offsets = torch.tensor([0, *(length + 1 for length in lengths)]).cumsum(0)
        return cls(PrefixTree.of(tokens, offsets, torch.arange(len(rows))), lengths, of_question)

    def order(self) -> list[int]:
        """Return the questions with those that begin alike next to each other."""
        rank = self.tree.rank.tolist()
        return sorted(range(len(self.of_question)), key=lambda number: rank[self.of_question[number][-1]])


@dataclass
class Read:
    """Which of a forward's tokens have their logits read, and for what. A place is an index in `columns`.

    Attributes:
        columns: tokens of the forward.
        targets: for each fresh question, the place and the token of every log p that is wanted.
        answering: for each fresh question, the places at its prompt's end and along the guess.
    """

    columns: dict[int, int] = field(default_factory=dict)
    targets: list[list[tuple[int, int]]] = field(default_factory=list)
    answering: list[list[int]] = field(default_factory=list)

    def place(self, column: int) -> int:
        return self.columns.setdefault(column, len(self.columns))

    def add(self, question: Question, rows: Sequence[list[int]]) -> None:
        """Add a question, given the tokens of each of its branches."""
        targets = [
            (self.place(row[index - 1]), scored.token_ids[index])
            for scored, row in zip(question.scored, rows, strict=False)
            for index in range(scored.start, len(scored.token_ids))
        ]
        self.targets.append(targets)
        end = len(question.prompt)
        wanted = rows[-1][end - 1 : end + len(question.guess)] if question.max_new_tokens else []
        self.answering.append([self.place(column) for column in wanted])
