"""Edits as token ids: prompt and target tokenised together, the target found by the tokenizer's own offsets."""

import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .edits import Edit

CHUNK_SIZE = 1000  # texts a tokenizer call: enough to keep it busy, few enough to keep their offsets small
IGNORED_LABEL = -100  # what torch's cross entropy leaves out
Offsets = list[tuple[int, int]]  # where each token begins and ends in its text, in characters


@dataclass(frozen=True, slots=True, eq=False)
class EncodedEdit:
    """One edit as token ids.

    Args:
        input_ids: (length,) int64: special tokens, prompt, target and its end.
        target_start: index of the first scored token, at least 1; `input_ids[target_start:]` is all that is scored.
    """

    input_ids: torch.Tensor
    target_start: int


@dataclass(frozen=True, eq=False)
class EncodedEdits(Dataset[EncodedEdit]):
    """Encoded edits in three flat tensors, so that 100,000 of them are light; `encode_edits` makes it.

    Args:
        token_ids: (total,) int32, the tokens of all edits one after the other.
        offsets: (edits + 1,) int64, where each edit begins, and the total.
        target_starts: (edits,) int64, each counted from the beginning of its edit.
    """

    token_ids: torch.Tensor
    offsets: torch.Tensor
    target_starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.target_starts)

    def __getitem__(self, index: int) -> EncodedEdit:
        index = range(len(self))[index]  # counts negative ones from the end, raises IndexError outside
        begin, end = self.offsets[index : index + 2].tolist()
        return EncodedEdit(self.token_ids[begin:end].long(), int(self.target_starts[index]))

    @property
    def lengths(self) -> torch.Tensor:
        """(edits,) int64: the number of tokens of each edit."""
        return self.offsets.diff()


class _Text(NamedTuple):
    edit: Edit
    text: str
    boundary: int  # where the prompt ends, in characters
    end: int  # where the target ends: behind it a chat template closes the turn


def encode_edits(
    edits: Sequence[Edit],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    chat_template: bool = False,
    max_length: int | None = None,
) -> EncodedEdits:
    """Tokenise edits, prompt and target together, and find where each target begins.

    The text is the prompt, a space unless either side has whitespace there, and the target. Special tokens that the
    tokenizer puts in front stay, those it puts behind make way for one EOS.

    Args:
        edits: at least one.
        tokenizer: a fast one; left as it is, and the padding or truncation set on it are not applied.
        append_eos: end each target with the EOS token, so that the model learns to stop.
        chat_template: write prompt and target as the turns of user and assistant, by the tokenizer's template. What it
            puts ahead of the answer is scored too, and the special token that ends the turn stands for EOS.
        max_length: the most tokens an edit may have, EOS included, such as the model's positions; None for no limit.

    Returns:
        The encoded edits, in order. A first scored token that also holds the end of the prompt is warned of, once.

    Raises:
        ValueError: there are no edits; the tokenizer is not fast, lacks the EOS token or the chat template that is
            asked for; the template does not answer the prompt with the target; prompt or target has no token of its
            own; an edit is longer than `max_length`.

    Example:
        >>> encoded = encode_edits([Edit(prompt="The capital of France is", target="Lyon")], tokenizer)
        >>> tokenizer.decode(encoded[0].input_ids[encoded[0].target_start :])
        ' Lyon<|im_end|>'
    """
    if not edits:
        raise ValueError("edits: found none; expected at least one")
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: found no EOS token; set tokenizer.eos_token, or pass append_eos=False")
    texts = _chat_texts(edits, tokenizer) if chat_template else [_plain_text(edit) for edit in edits]
    turn_ends = _special_ids(tokenizer) if chat_template else None
    encoded = _encode_texts(texts, tokenizer, turn_ends, [tokenizer.eos_token_id] if append_eos else [])
    if max_length is not None:
        _check_lengths(encoded.lengths, edits, max_length)
    return encoded


def prompt_text(prompt: str, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool) -> str:
    """Write a prompt as an edited model is asked it.

    Args:
        prompt: the question.
        tokenizer: whose template is used.
        chat_template: as in `encode_edits`.

    Returns:
        The prompt itself, or the user's turn and the opening of the assistant's.

    Raises:
        ValueError: `chat_template` is set and the tokenizer has none.
    """
    return _render(tokenizer, prompt) if chat_template else prompt


def encode_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = False
) -> list[list[int]]:
    """Tokenise prompts as `encode_edits` does the prompts of edits: what a model is given to continue.

    Args:
        prompts: the questions.
        tokenizer: a fast one; left as it is.
        chat_template: as in `encode_edits`.

    Returns:
        The token ids of each prompt, with the tokenizer's special tokens in front and none behind.

    Raises:
        ValueError: the tokenizer is not fast, or lacks the chat template that is asked for.

    Example:
        >>> encode_prompts(["The capital of France is"], tokenizer)
        [[504, 3575, 282, 4649, 314]]
    """
    texts = [prompt_text(prompt, tokenizer, chat_template=chat_template) for prompt in prompts]
    return [ids for ids, _ in _tokenize(texts, tokenizer, add_special_tokens=not chat_template)]


def collate(batch: Sequence[EncodedEdit], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad encoded edits on the right, to B rows of T, the longest.

    Args:
        batch: B edits, at least one.
        pad_token_id: what to fill up with; may be the EOS token, since nothing is recognised by it.

    Returns:
        `input_ids` (B, T), `attention_mask` (B, T) with 1 on tokens, `labels` (B, T) with -100 everywhere but on the
        target, `target_start` (B,); all int64.
    """
    input_ids = pad_sequence([edit.input_ids for edit in batch], batch_first=True, padding_value=pad_token_id)
    target_start = torch.tensor([edit.target_start for edit in batch])
    positions = torch.arange(input_ids.shape[1])
    is_token = positions < torch.tensor([[len(edit.input_ids)] for edit in batch])
    labels = input_ids.masked_fill(~is_token | (positions < target_start[:, None]), IGNORED_LABEL)
    return dict(input_ids=input_ids, attention_mask=is_token.long(), labels=labels, target_start=target_start)


def _plain_text(edit: Edit) -> _Text:
    separator = "" if edit.prompt[-1].isspace() or edit.target[0].isspace() else " "
    text = edit.prompt + separator + edit.target
    return _Text(edit, text, boundary=len(edit.prompt), end=len(text))


def _chat_texts(edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase) -> list[_Text]:
    # what the template puts behind any answer: a search for the target would also hit "end" in "<|im_end|>"
    answer = "the answer whose end is looked for"
    closing = _render(tokenizer, "a question", answer).rpartition(answer)[2]
    texts = []
    for edit in edits:
        head, text = _render(tokenizer, edit.prompt), _render(tokenizer, edit.prompt, edit.target)
        end = len(text) - len(closing)
        if not (text.startswith(head) and text.endswith(closing) and edit.target.strip() in text[len(head) : end]):
            found = f"found a chat template that renders {text!r}; expected {head!r}, then the target {edit.target!r}"
            raise ValueError(f"{_name(edit)}: {found}: set tokenizer.chat_template, or pass chat_template=False")
        texts.append(_Text(edit, text, boundary=len(head), end=end))
    return texts


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str | None = None) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("tokenizer: found no chat template; set tokenizer.chat_template, or pass chat_template=False")
    answer = [] if target is None else [{"role": "assistant", "content": target}]
    messages = [{"role": "user", "content": prompt}, *answer]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=target is None, tokenize=False))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # all_special_ids leaves out markers such as Llama 3's <|eot_id|>
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode_texts(
    texts: list[_Text], tokenizer: PreTrainedTokenizerBase, turn_ends: set[int] | None, ending: list[int]
) -> EncodedEdits:
    flat, begins, starts, straddling = array("i"), [0], [], []
    all_tokens = _tokenize([text.text for text in texts], tokenizer, add_special_tokens=turn_ends is None)
    for text, (ids, offsets) in zip(texts, all_tokens, strict=True):
        start, straddles = _target_start(offsets, text)
        if straddles:
            straddling.append(text.edit)
        flat.extend(ids + ending if turn_ends is None else _whole_turn(ids, offsets, text.end, turn_ends, ending))
        begins.append(len(flat))
        starts.append(start)
    if straddling:
        _warn_of_straddling(straddling[0], f"{len(straddling)} of {len(texts)}")
    return EncodedEdits(torch.frombuffer(flat, dtype=torch.int32), torch.tensor(begins), torch.tensor(starts))


def _tokenize(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> Iterator[tuple[list[int], Offsets]]:
    if not tokenizer.is_fast:
        found = f"found the slow {type(tokenizer).__name__}, which cannot say where its tokens stand in the text"
        raise ValueError(f"tokenizer: {found}; expected a fast one: load it with AutoTokenizer")
    for begin in range(0, len(texts), CHUNK_SIZE):
        with _padding_and_truncation_kept(tokenizer.backend_tokenizer):
            encodings = tokenizer(
                texts[begin : begin + CHUNK_SIZE],
                add_special_tokens=add_special_tokens,
                padding=False,
                truncation=False,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                verbose=False,
            )
        columns = encodings["input_ids"], encodings["offset_mapping"], encodings["special_tokens_mask"]
        for ids, offsets, is_added in zip(*columns, strict=True):
            stop = len(ids)
            while stop and is_added[stop - 1]:
                stop -= 1
            yield ids[:stop], offsets[:stop]


@contextmanager
def _padding_and_truncation_kept(backend: Any) -> Iterator[None]:
    # a call without them takes away what the caller has set up in the Rust tokenizer
    padding, truncation = backend.padding, backend.truncation
    try:
        yield
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)


def _target_start(offsets: Offsets, text: _Text) -> tuple[int, bool]:
    """Find the target's first token, and whether it also holds the end of the prompt."""
    # a token is known by its end: where it begins may or may not count the space in front, as tokenizers differ
    start = next((index for index, (_, end) in enumerate(offsets) if end > text.boundary), None)
    first = text.text.rindex(text.edit.target.strip(), text.boundary, text.end)
    has_target = any(begin < text.end and end > first for begin, end in offsets)
    if not start or not has_target:
        found = f"found no token for the {'prompt' if has_target else 'target'} alone in {text.text!r}"
        raise ValueError(f"{_name(text.edit)}: {found}; expected at least one: use text that the tokenizer knows")
    # where the token before it ends short of the prompt, this one has the rest, whatever its own offsets say
    return start, offsets[start - 1][1] < text.boundary


def _warn_of_straddling(edit: Edit, share: str) -> None:
    found = f"found a token that {edit.prompt!r} and {edit.target!r} share, as {share} edits have; it is scored"
    advice = "remove whitespace from the end of the prompt, or of what the chat template opens an answer with"
    warnings.warn(f"{_name(edit)}: {found}: {advice}", stacklevel=4)


def _whole_turn(ids: list[int], offsets: Offsets, end: int, turn_ends: set[int], ending: list[int]) -> list[int]:
    """Cut behind the special token that ends the target's turn; where none does, cut behind the target and end it."""
    after = next((index for index, (begin, _) in enumerate(offsets) if begin >= end), len(ids))
    turn_end = next((index for index in range(after, len(ids)) if ids[index] in turn_ends), None)
    return ids[:after] + ending if turn_end is None else ids[: turn_end + 1]


def _check_lengths(lengths: torch.Tensor, edits: Sequence[Edit], max_length: int) -> None:
    too_long = (lengths > max_length).nonzero().flatten().tolist()
    if too_long:
        head = f"{len(too_long)} of {len(edits)} edits are longer than max_length={max_length} tokens. The first:"
        first = [f"  {_name(edits[index])}: {lengths[index]}" for index in too_long[:5]]
        raise ValueError("\n".join([head, *first, "Shorten or remove them, or raise max_length if the model can."]))


def _name(edit: Edit) -> str:
    return edit.source or repr(edit.prompt)
