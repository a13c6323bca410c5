"""Generate many answers at once, with packed prompts and a KV cache without padding."""

from __future__ import annotations

from collections import Counter
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
    """An unfinished answer.

    Args:
        number: the index of its question.
        answer: its tokens so far.
        history: the slots in the KV cache of all its tokens, prompt included, but the last.
    """

    number: int
    answer: Answer
    history: list[int]


class PackedKVCache:
    """Keys and values of tokens, by layer, (capacity, heads, d): appended, and compacted when full.

    A layer that attends several times in a forward has as many entries.
    """

    def __init__(self) -> None:
        self.layers: dict[tuple[nn.Module, int], list[torch.Tensor]] = {}
        self.used = 0
        self.capacity = 0
        self._num_calls: Counter[nn.Module] = Counter()

    def end_forward(self, num_tokens: int) -> None:
        """Count the tokens of a forward as stored."""
        self.used += num_tokens
        self._num_calls.clear()

    def make_room(self, num_tokens: int, active: Sequence[ActiveSequence]) -> None:
        """Make room for more tokens; if needed, drop the tokens that no active sequence uses."""
        if self.used + num_tokens <= self.capacity:
            return
        slots = torch.tensor([slot for row in active for slot in row.history], dtype=torch.int64)
        live, inverse = torch.unique(slots, return_inverse=True)
        moved = iter(inverse.tolist())
        for row in active:
            row.history = [next(moved) for _ in row.history]
        self.used = len(live)
        self.capacity = max(self.capacity, 2 * (self.used + num_tokens))
        for cached in self.layers.values():
            for index, tensor in enumerate(cached):
                cached[index] = tensor.new_empty(self.capacity, *tensor.shape[1:])
                cached[index][: self.used] = tensor[live.to(tensor.device)]

    def write(self, module: nn.Module, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Append a layer's keys and values, each (1, heads, N, d), and return all of the layer's."""
        rows = [tensor[0].transpose(0, 1) for tensor in states]
        key = (module, self._num_calls[module])
        self._num_calls[module] += 1
        if key not in self.layers:
            self.layers[key] = [tensor.new_empty(self.capacity, *tensor.shape[1:]) for tensor in rows]
        for cached, tensor in zip(self.layers[key], rows, strict=True):
            cached[self.used : self.used + len(tensor)] = tensor
        return self.layers[key]


@dataclass(frozen=True)
class QuestionTree:
    """The token ids of some questions as one prefix tree.

    Args:
        prefixes: the rows of all questions. Those of a question are its continuations, then its prompt with its guess.
        of_question: the rows of each question.
    """

    prefixes: PrefixTree
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
        # the tree leaves out the last token of each row, so append one
        tokens = torch.tensor([token for row in rows for token in (*row, 0)])
        offsets = torch.tensor([0, *(len(row) + 1 for row in rows)]).cumsum(0)
        return cls(PrefixTree.of(tokens, offsets, torch.arange(len(rows))), of_question)

    def order(self) -> list[int]:
        """Return the indices of the questions, with similar prompts next to each other."""
        rank = self.prefixes.rank.tolist()
        return sorted(range(len(self.of_question)), key=lambda number: rank[self.of_question[number][-1]])


@dataclass
class LogitsPlan:
    """Which logits of a forward are computed, and what for. A place is a row of these logits.

    Attributes:
        columns: for each token of the forward whose logits are computed, its place.
        targets: for each new question, the place and the token of every log p to return.
        answering: for each new question, the places that choose its first tokens: at the prompt's end and along the
            guess.
    """

    columns: dict[int, int] = field(default_factory=dict)
    targets: list[list[tuple[int, int]]] = field(default_factory=list)
    answering: list[list[int]] = field(default_factory=list)

    def place(self, column: int) -> int:
        """Return the place of a token of the forward."""
        return self.columns.setdefault(column, len(self.columns))

    def add(self, question: Question, rows: Sequence[list[int]]) -> None:
        """Add a question, given the tokens of the forward that make up each of its rows."""
        targets = [
            (self.place(row[index - 1]), scored.token_ids[index])
            for scored, row in zip(question.scored, rows, strict=False)
            for index in range(scored.start, len(scored.token_ids))
        ]
        self.targets.append(targets)
        end = len(question.prompt)
        columns = rows[-1][end - 1 : end + len(question.guess)] if question.max_new_tokens else []
        self.answering.append([self.place(column) for column in columns])


@dataclass(frozen=True)
class Step:
    """One forward: the tokens of new prompts, (F,), then one token of each active sequence, (R,).

    Args:
        pack: the new prompts; `None`: there are none.
        num_new: F.
        history: (R, T) the slots in the KV cache of each active sequence's tokens, the new one included.
        lengths: (R,) the number of these tokens; the rest of the row is padding.
    """

    pack: Pack | None
    num_new: int
    history: torch.Tensor
    lengths: torch.Tensor


@dataclass
class PackedDecoder:
    """Answers questions with a model for which packing gives its own logits.

    Args:
        model: the model, in evaluation mode.
        layers: its decoder layers.
        device: where forwards run.
        max_tokens: the largest number of tokens in one forward; a longer question is a forward by itself.
        ends: finds where answers end.
        choose: chooses the next token from logits.
    """

    model: nn.Module
    layers: nn.ModuleList
    device: torch.device
    max_tokens: int
    ends: StopCounter
    choose: Choice
    _cache: PackedKVCache = field(default_factory=PackedKVCache)

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], progress: tqdm[Any]) -> list[Answer]:
        """Return the answers, in the order of the questions."""
        tree = QuestionTree.of(questions)
        waiting = tree.order()[::-1]
        answers = [Answer() for _ in questions]
        active: list[ActiveSequence] = []
        while waiting or active:
            new = self._admit(waiting, questions, self.max_tokens - len(active), must=not active)
            rows = self._forward(questions, answers, tree, new, active)
            active = [row for row in rows if not self.ends.is_finished(questions[row.number], row.answer.token_ids)]
            progress.update(len(rows) - len(active))
        return answers

    @staticmethod
    def _admit(waiting: list[int], questions: Sequence[Question], room: int, must: bool) -> list[int]:
        """Take questions off the end of `waiting` while their tokens fit; at least one if `must`."""
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
        tree: QuestionTree,
        new: Sequence[int],
        active: list[ActiveSequence],
    ) -> list[ActiveSequence]:
        """Read new questions and continue active sequences; return all of them, each with one more token or more."""
        rows = [row for number in new for row in tree.of_question[number]]
        pack = tree.prefixes.pack(torch.tensor(rows)) if rows else None
        num_new = 0 if pack is None else len(pack.nodes)
        self._cache.make_room(num_new + len(active), active)
        first = self._cache.used
        for slot, row in enumerate(active, start=first + num_new):
            row.history.append(slot)

        plan, slots = LogitsPlan(), iter(() if pack is None else pack.slots.tolist())
        started = []
        for number in new:
            of_question = [next(slots) for _ in tree.of_question[number]]
            plan.add(questions[number], of_question)
            started.append(ActiveSequence(number, answers[number], [first + slot for slot in of_question[-1]]))
        for offset in range(len(active)):
            plan.place(num_new + offset)

        logits = self._logits(pack, num_new, active, list(plan.columns))
        _check_finite(logits, plan, questions, new, active, self.ends)
        self._read_new(questions, started, plan, logits)
        if active:
            places = [(row.number, len(row.answer.token_ids)) for row in active]
            chosen = self.choose(logits[-len(active) :], places).tolist()
            for row, token in zip(active, chosen, strict=True):
                row.answer.token_ids.append(token)
        return active + started

    def _logits(
        self, pack: Pack | None, num_new: int, active: Sequence[ActiveSequence], columns: list[int]
    ) -> torch.Tensor:
        """Run one forward and return its logits at some tokens, (columns, V), in float32."""
        tokens = torch.tensor([row.answer.token_ids[-1] for row in active], dtype=torch.int64)
        lengths = torch.tensor([len(row.history) for row in active], dtype=torch.int64)
        positions = lengths - 1
        if pack is not None:
            tokens, positions = torch.cat([pack.token_ids, tokens]), torch.cat([pack.positions, positions])
        history = pad_sequence([torch.tensor(row.history) for row in active], batch_first=True) if active else lengths
        where = torch.tensor(columns, dtype=torch.int64, device=self.device)
        inputs = {"input_ids": tokens[None].to(self.device), "position_ids": positions[None].to(self.device)}
        with attending(self.layers, partial(self._attend, Step(pack, num_new, history, lengths))):
            outputs = logits_at(self.model, torch.zeros_like(where), where, inputs | {"use_cache": False})
        self._cache.end_forward(len(tokens))
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
        """Let new prompts attend within themselves, and the token of each active sequence to all tokens before it."""
        cached = self._cache.write(module, (key, value))
        outputs, count = [], step.num_new
        if step.pack is not None:
            attend = partial(attend_within, step.pack, module, sliding_window=sliding_window, **kwargs)
            outputs.append(attend(query=query[:, :, :count], key=key[:, :, :count], value=value[:, :, :count]))
        if len(step.lengths):
            history, lengths = step.history.to(query.device), step.lengths.to(query.device)[:, None]
            positions = torch.arange(history.shape[1], device=query.device)
            visible = positions < lengths
            if sliding_window is not None:
                visible &= positions >= lengths - sliding_window
            states = [take(tensor, history).transpose(1, 2) for tensor in cached]
            one_each = query[0, :, count:].transpose(0, 1).unsqueeze(2)
            output, _ = sdpa_attention_forward(module, one_each, *states, visible[:, None, None], **kwargs)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs, dim=1)

    def _read_new(
        self, questions: Sequence[Question], started: Sequence[ActiveSequence], plan: LogitsPlan, logits: torch.Tensor
    ) -> None:
        """Set the scores, and the answers as far as their guesses are right; cut each history to match its answer."""
        best = logits.argmax(dim=-1).tolist()
        log_probs = iter(_log_probs(logits, [target for targets in plan.targets for target in targets]))
        for row, targets, places in zip(started, plan.targets, plan.answering, strict=True):
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
                is_right = (*question.guess, None)[accepted] == chosen
                if not is_right or self.ends.is_finished(question, row.answer.token_ids):
                    break
            del row.history[len(question.prompt) + accepted :]


def num_tokens(question: Question) -> int:
    """Return the largest number of tokens that a question can add to a forward."""
    scored = sum(len(scored.token_ids) - scored.start for scored in question.scored)
    return len(question.prompt) + len(question.guess) + scored


def _log_probs(logits: torch.Tensor, targets: Sequence[tuple[int, int]]) -> list[float]:
    if not targets:
        return []
    places, tokens = torch.tensor(targets, device=logits.device).unbind(dim=1)
    return (logits[places, tokens] - logits.logsumexp(dim=-1)[places]).tolist()


def _check_finite(
    logits: torch.Tensor,
    plan: LogitsPlan,
    questions: Sequence[Question],
    new: Sequence[int],
    active: Sequence[ActiveSequence],
    ends: StopCounter,
) -> None:
    """Raise a FloatingPointError that names the first prompt with NaN or infinite logits."""
    bad = (~logits.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    of_new = zip(new, plan.targets, plan.answering, strict=True)
    numbers = {place: number for number, targets, places in of_new for place in (*places, *(p for p, _ in targets))}
    number = numbers[bad[0]] if bad[0] in numbers else active[bad[0] - len(logits)].number
    raise ends.not_finite(questions[number])
