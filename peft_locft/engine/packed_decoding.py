"""Keys and values of the tokens before, for answers that are under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .packed_attention import attend_within, attending, take
from .prefix_tree import Pack, PrefixTree
from .questions import Answer, Choice, Question, Score, StopCounter, greedy
from .tail import logits_at


@dataclass
class ActiveSequence:
    """An answer under way: where its tokens' keys and values are kept, but for the last."""

    number: int
    answer: Answer
    history: list[int]


class PackedKVCache:
    """Keys and values of tokens, by layer, (capacity, heads, d): written at the end, moved together when full."""

    def __init__(self) -> None:
        self.layers: dict[nn.Module, list[torch.Tensor]] = {}
        self.used = 0
        self.capacity = 0

    def make_room(self, num_tokens: int, running: Sequence[ActiveSequence]) -> None:
        if self.used + num_tokens <= self.capacity:
            return
        slots = torch.tensor([slot for row in running for slot in row.history], dtype=torch.int64)
        live, inverse = torch.unique(slots, return_inverse=True)
        moved = iter(inverse.tolist())
        for row in running:
            row.history = [next(moved) for _ in row.history]
        self.used = len(live)
        self.capacity = max(self.capacity, 2 * (self.used + num_tokens))
        for kept in self.layers.values():
            for index, tensor in enumerate(kept):
                kept[index] = tensor.new_empty(self.capacity, *tensor.shape[1:])
                kept[index][: self.used] = tensor[live.to(tensor.device)]

    def write(self, module: nn.Module, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Keep a layer's keys and values, each (1, heads, N, d), behind the others; return all that it has."""
        rows = [tensor[0].transpose(0, 1) for tensor in states]
        if module not in self.layers:
            self.layers[module] = [tensor.new_empty(self.capacity, *tensor.shape[1:]) for tensor in rows]
        for kept, tensor in zip(self.layers[module], rows, strict=True):
            kept[self.used : self.used + len(tensor)] = tensor
        return self.layers[module]


@dataclass(frozen=True)
class QuestionTree:
    """The sequences of token ids of some questions, as a tree: each continuation, and prompt and guess last."""

    tree: PrefixTree
    lengths: list[int]
    of_question: list[range]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> QuestionTree:
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
class LogitsPlan:
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


@dataclass(frozen=True)
class Step:
    """One forward: the tokens of whole prompts first, (F,), then one of each running answer, (R,).

    Args:
        pack: the prompts, if there are any.
        num_fresh: F.
        history: (R, T) where the keys and values of each running answer's tokens are, its new one included.
        lengths: (R,) how many of them it has; the rest of its row is padding.
    """

    pack: Pack | None
    num_fresh: int
    history: torch.Tensor
    lengths: torch.Tensor


@dataclass
class PackedDecoder:
    """Answers questions with a model that `find_packing` has found to take packed tokens.

    Args:
        model: in evaluation mode.
        layers: its decoder layers.
        device: where forwards run.
        max_tokens: in one forward; a question that is longer by itself is asked alone.
        ends: where answers end.
        choose: the next token from logits.
    """

    model: nn.Module
    layers: nn.ModuleList
    device: torch.device
    max_tokens: int
    ends: StopCounter
    choose: Choice
    _kept: PackedKVCache = field(default_factory=PackedKVCache)

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Return the answers, in the order of the questions."""
        branches = QuestionTree.of(questions)
        waiting = branches.order()[::-1]
        answers = [Answer() for _ in questions]
        running: list[ActiveSequence] = []
        while waiting or running:
            fresh = self._admit(waiting, questions, self.max_tokens - len(running), must=not running)
            rows = self._forward(questions, answers, branches, fresh, running)
            running = [row for row in rows if not self.ends.is_whole(questions[row.number], row.answer.token_ids)]
            progress.update(len(rows) - len(running))
        return answers

    @staticmethod
    def _admit(waiting: list[int], questions: Sequence[Question], room: int, must: bool) -> list[int]:
        admitted: list[int] = []
        while waiting:
            room -= num_tokens(questions[waiting[-1]])
            if room < 0 and (admitted or not must):
                break
            admitted.append(waiting.pop())
        return admitted

    def _forward(
        self,
        questions: Sequence[Question],
        answers: Sequence[Answer],
        branches: QuestionTree,
        fresh: Sequence[int],
        running: list[ActiveSequence],
    ) -> list[ActiveSequence]:
        """Read fresh questions, and go on with running answers; return all of these with one more token at least."""
        rows = [row for number in fresh for row in branches.of_question[number]]
        pack = branches.tree.pack(torch.tensor(rows)) if rows else None
        num_fresh = 0 if pack is None else len(pack.nodes)
        self._kept.make_room(num_fresh + len(running), running)
        first = self._kept.used
        for offset, row in enumerate(running, start=first + num_fresh):
            row.history.append(offset)

        read, slots = LogitsPlan(), iter(() if pack is None else pack.slots.tolist())
        begun = []
        for number in fresh:
            of_question = [next(slots) for _ in branches.of_question[number]]
            read.add(questions[number], of_question)
            begun.append(ActiveSequence(number, answers[number], [first + slot for slot in of_question[-1]]))
        for offset in range(len(running)):
            read.place(num_fresh + offset)

        logits = self._logits(pack, num_fresh, running, list(read.columns))
        _check_finite(logits, read, questions, fresh, running, self.ends)
        self._read_fresh(questions, begun, read, logits)
        if running:
            places = [(row.number, len(row.answer.token_ids)) for row in running]
            chosen = self.choose(logits[-len(running) :], places).tolist()
            for row, token in zip(running, chosen, strict=True):
                row.answer.token_ids.append(token)
        return running + begun

    def _logits(
        self, pack: Pack | None, num_fresh: int, running: Sequence[ActiveSequence], columns: list[int]
    ) -> torch.Tensor:
        tokens = torch.tensor([row.answer.token_ids[-1] for row in running], dtype=torch.int64)
        lengths = torch.tensor([len(row.history) for row in running], dtype=torch.int64)
        positions = lengths - 1
        if pack is not None:
            tokens, positions = torch.cat([pack.token_ids, tokens]), torch.cat([pack.positions, positions])
        history = (
            pad_sequence([torch.tensor(row.history) for row in running], batch_first=True) if running else lengths
        )
        where = torch.tensor(columns, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": tokens[None].to(self.device), "position_ids": positions[None].to(self.device)}
        with attending(self.layers, partial(self._attend, Step(pack, num_fresh, history, lengths))):
            outputs = logits_at(self.model, torch.zeros_like(where), where, inputs | {"use_cache": False})
        self._kept.used += len(tokens)
        return outputs.logits.float()

    def _attend(
        self,
        step: Step,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Let prompts attend within themselves, and each running answer's token to all before it."""
        kept = self._kept.write(module, (key, value))
        outputs, count = [], step.num_fresh
        if step.pack is not None:
            fresh = partial(attend_within, step.pack, module, sliding_window=sliding_window, **kwargs)
            outputs.append(fresh(query=query[:, :, :count], key=key[:, :, :count], value=value[:, :, :count]))
        if len(step.lengths):
            history, lengths = step.history.to(query.device), step.lengths.to(query.device)[:, None]
            positions = torch.arange(history.shape[1], device=query.device)
            seen = positions < lengths
            if sliding_window is not None:
                seen &= positions >= lengths - sliding_window
            states = [take(tensor, history).transpose(1, 2) for tensor in kept]
            one_each = query[0, :, count:].transpose(0, 1).unsqueeze(2)
            output, _ = sdpa_attention_forward(module, one_each, *states, seen[:, None, None], **kwargs)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs, dim=1)

    def _read_fresh(
        self, questions: Sequence[Question], begun: Sequence[ActiveSequence], read: LogitsPlan, logits: torch.Tensor
    ) -> None:
        """Fill in scores, and answers as far as their guesses are right; leave in each history what they rest on."""
        best = logits.argmax(dim=-1).tolist()
        log_probs = iter(_log_probs(logits, [target for targets in read.targets for target in targets]))
        for row, targets, places in zip(begun, read.targets, read.answering, strict=True):
            question, pairs = questions[row.number], iter(targets)
            for scored in question.scored:
                predicted = [best[next(pairs)[0]] for _ in scored.token_ids[scored.start :]]
                row.answer.scores.append(Score([next(log_probs) for _ in predicted], predicted))
            accepted = 0
            for accepted, place in enumerate(places):
                chosen = best[place]
                if self.choose is not greedy:
                    chosen = int(self.choose(logits[place : place + 1], [(row.number, accepted)]))
                row.answer.token_ids.append(chosen)
                if (*question.guess, None)[accepted] != chosen or self.ends.is_whole(question, row.answer.token_ids):
                    break
            del row.history[len(question.prompt) + accepted :]


def num_tokens(question: Question) -> int:
    """Return how many tokens a question adds to a forward, at most."""
    scored = sum(len(scored.token_ids) - scored.start for scored in question.scored)
    return len(question.prompt) + len(question.guess) + scored


def _log_probs(logits: torch.Tensor, targets: Sequence[tuple[int, int]]) -> list[float]:
    if not targets:
        return []
    places, tokens = torch.tensor(targets, device=logits.device).unbind(dim=1)
    return (logits[places, tokens] - logits.logsumexp(dim=-1)[places]).tolist()


def _check_finite(
    logits: torch.Tensor,
    read: LogitsPlan,
    questions: Sequence[Question],
    fresh: Sequence[int],
    running: Sequence[ActiveSequence],
    ends: StopCounter,
) -> None:
    bad = (~logits.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    of_fresh = zip(fresh, read.targets, read.answering, strict=True)
    numbers = {place: number for number, targets, places in of_fresh for place in (*places, *(p for p, _ in targets))}
    number = numbers[bad[0]] if bad[0] in numbers else running[bad[0] - len(logits)].number
    raise ends.not_finite(questions[number])
