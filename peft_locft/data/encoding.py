"""Edits as token ids: prompt and target are tokenized together, and scored from the end of the prompt's tokens."""

import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .chat import ChatWriter, chat_template_mode
from .edits import Edit, Prompt, place_of
from .joining import TargetSeparator, separator_between, target_separator_mode

CHUNK_SIZE = 1000  # texts per tokenizer call: more would need more memory for their offsets
IGNORED_LABEL = -100  # ignored by torch's cross entropy
Offsets = list[tuple[int, int]]  # begin and end of each token in its text, in characters


@dataclass(frozen=True, slots=True, eq=False)
class EncodedEdit:
    """One edit as token ids.

    Args:
        input_ids: (length,) int64: special tokens, prompt, target and its end.
        target_start: index of the first scored token, at least 1; `input_ids[target_start:]` is scored.
    """

    input_ids: torch.Tensor
    target_start: int


@dataclass(frozen=True, eq=False)
class EncodedEdits(Dataset[EncodedEdit]):
    """Encoded edits in three flat tensors, which need little memory for 100,000 edits; `encode_edits` returns it.

    Args:
        token_ids: (total,) int32, the tokens of all edits in order.
        offsets: (edits + 1,) int64, where each edit begins, and the total.
        target_starts: (edits,) int64, index of the first scored token in each edit.
    """

    token_ids: torch.Tensor
    offsets: torch.Tensor
    target_starts: torch.Tensor

    def __len__(self) -> int:
        return len(self.target_starts)

    def __getitem__(self, index: int) -> EncodedEdit:
        index = range(len(self))[index]  # negative indices count from the end; raises IndexError
        begin, end = self.offsets[index : index + 2].tolist()
        return EncodedEdit(self.token_ids[begin:end].long(), int(self.target_starts[index]))

    @property
    def lengths(self) -> torch.Tensor:
        """(edits,) int64: the number of tokens of each edit."""
        return self.offsets.diff()


class _Text(NamedTuple):
    edit: Edit
    text: str
    boundary: int  # end of the prompt, in characters
    end: int  # end of the target; a chat template closes the turn after it
    in_chat: bool  # written by a chat template, which writes all special tokens itself


def encode_edits(
    edits: Sequence[Edit],
    tokenizer: PreTrainedTokenizerBase,
    *,
    append_eos: bool = True,
    chat_template: bool | str = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    target_separator: str = "auto",
) -> EncodedEdits:
    """Tokenize edits, prompt and target together, and find where each target begins.

    The text is the prompt, a space or nothing (see `joining.separator_between`), and the target. Where nothing stands
    between them and a token would hold the end of one and the beginning of the other, they are tokenized apart, so
    that the model is trained on the prompt's tokens as it will be asked. Special tokens that the
    tokenizer adds in front stay, except a second BOS before one in the prompt; special tokens that it adds at the end
    are replaced by one EOS.

    Args:
        edits: at least one.
        tokenizer: a fast tokenizer. It is not changed; its padding and truncation are not applied.
        append_eos: end each target with the EOS token, so that the model learns to stop.
        chat_template: `True` or `"on"`: write prompt and target as the turns of user and assistant, with the
            tokenizer's template. What it writes before the answer (an empty block of thoughts, the header of a
            channel) belongs to the prompt and is not scored. The special token that ends the turn replaces EOS. Edits
            that are conversations are written with the template in any case.
        chat_template_kwargs: arguments of the template, such as `{"enable_thinking": False}`.
        max_length: maximum number of tokens of an edit, with EOS, such as the model's positions; `None`: no limit.
        target_separator: `"space"` between a prompt and its target, `"none"`, or `"auto"`: as their scripts write it.

    Returns:
        The encoded edits, in order. Warns once if a first scored token also contains the end of the prompt, and once
        if a target contains text that the tokenizer does not know.

    Raises:
        ValueError: if there are no edits; the tokenizer is not fast, or has no EOS token or chat template although
            one is used; the template fails, or does not contain the prompt, and the target as the answer; prompt or
            target has no token of its own; the tokenizer knows nothing of a target, or gives wrong offsets; an edit is
            longer than `max_length`.

    Example:
        >>> encoded = encode_edits([Edit(prompt="The capital of France is", target="Lyon")], tokenizer)
        >>> tokenizer.decode(encoded[0].input_ids[encoded[0].target_start :])
        ' Lyon<|im_end|>'
    """
    if not edits:
        raise ValueError("edits: found none; expected at least one")
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: found no EOS token; set tokenizer.eos_token, or pass append_eos=False")
    separator = target_separator_mode(target_separator)
    are_chat = [_is_on(chat_template) or edit.history is not None for edit in edits]
    writer = ChatWriter(tokenizer, chat_template_kwargs or {}) if any(are_chat) else None
    texts = [
        _Text(edit, *writer.edit(edit), in_chat=True) if writer and is_chat else _plain_text(edit, separator)
        for edit, is_chat in zip(edits, are_chat, strict=True)
    ]
    encoded = _encode_texts(texts, tokenizer, [tokenizer.eos_token_id] if append_eos else [])
    if max_length is not None:
        _check_lengths(encoded.lengths, edits, max_length)
    return encoded


def encode_prompts(
    prompts: Sequence[str | Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: bool | str = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Tokenize prompts for a model to continue, as `encode_edits` tokenizes the prompts of edits.

    Args:
        prompts: the questions; a `Prompt` with a history is written with the chat template in any case.
        tokenizer: a fast tokenizer; it is not changed.
        chat_template: as in `encode_edits`.
        chat_template_kwargs: as in `encode_edits`.

    Returns:
        The token ids of each prompt, with the tokenizer's special tokens in front and none at the end.

    Raises:
        ValueError: if the tokenizer is not fast or gives no token of a prompt; if a chat template is used and it has
            none, or it fails or leaves out a prompt.

    Example:
        >>> encode_prompts(["The capital of France is"], tokenizer)
        [[504, 3575, 282, 4649, 314]]
    """
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    are_chat = [_is_on(chat_template) or prompt.history is not None for prompt in asked]
    writer = ChatWriter(tokenizer, chat_template_kwargs or {}) if any(are_chat) else None
    texts = [
        writer.prompt(prompt) if writer and is_chat else prompt.text
        for prompt, is_chat in zip(asked, are_chat, strict=True)
    ]
    rows = [ids for ids, _ in _tokenize_each(texts, are_chat, tokenizer)]
    if [] in rows:
        prompt = asked[rows.index([])].text
        raise ValueError(f"{prompt!r}: found no token of the prompt; expected text that the tokenizer knows")
    return rows


def _is_on(chat_template: bool | str) -> bool:
    mode = chat_template_mode(chat_template)
    if mode in ("auto", "both"):
        raise ValueError(f"chat_template={chat_template!r}: expected 'on' or 'off', since a row has one form.")
    return mode == "on"


def collate(batch: Sequence[EncodedEdit], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad B encoded edits on the right, to the length T of the longest.

    Args:
        batch: B edits, at least one.
        pad_token_id: token id of the padding; EOS is fine, since masks and labels mark the padding.

    Returns:
        `input_ids` (B, T), `attention_mask` (B, T) with 1 on tokens, `labels` (B, T) with -100 except on the target,
        `target_start` (B,); all int64.
    """
    input_ids = pad_sequence([edit.input_ids for edit in batch], batch_first=True, padding_value=pad_token_id)
    target_start = torch.tensor([edit.target_start for edit in batch])
    positions = torch.arange(input_ids.shape[1])
    is_token = positions < torch.tensor([[len(edit.input_ids)] for edit in batch])
    labels = input_ids.masked_fill(~is_token | (positions < target_start[:, None]), IGNORED_LABEL)
    return dict(input_ids=input_ids, attention_mask=is_token.long(), labels=labels, target_start=target_start)


def flatten_rows(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> EncodedEdits:
    """Return rows of token ids as encoded edits; `starts` has the index of the first scored token of each row."""
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return EncodedEdits(tokens, offsets, torch.tensor(starts))


def join_encoded(parts: Sequence[EncodedEdits]) -> EncodedEdits:
    """Return the rows of one or more parts as one, in order."""
    lengths = torch.cat([part.lengths for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens, starts = (torch.cat([getattr(part, name) for part in parts]) for name in ("token_ids", "target_starts"))
    return EncodedEdits(tokens, offsets, starts)


def slice_encoded(encoded: EncodedEdits, begin: int, end: int | None) -> EncodedEdits:
    """Return rows `begin` to `end` (exclusive; `None`: the last)."""
    end = len(encoded) if end is None else end
    offsets = encoded.offsets[begin : end + 1]
    tokens = encoded.token_ids[int(offsets[0]) : int(offsets[-1])]
    return EncodedEdits(tokens, offsets - offsets[0], encoded.target_starts[begin:end])


def _plain_text(edit: Edit, separator: TargetSeparator) -> _Text:
    text = edit.prompt + separator_between(edit.prompt, edit.target, separator) + edit.target
    return _Text(edit, text, boundary=len(edit.prompt), end=len(text), in_chat=False)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    # all_special_ids lacks markers such as Llama 3's <|eot_id|>
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode_texts(texts: list[_Text], tokenizer: PreTrainedTokenizerBase, ending: list[int]) -> EncodedEdits:
    flat, begins, starts, straddling, unknown = array("i"), [0], [], [], []
    turn_ends, unknown_id = _special_ids(tokenizer), tokenizer.unk_token_id
    are_chat = [text.in_chat for text in texts]
    all_tokens = _tokenize_each([text.text for text in texts], are_chat, tokenizer)
    heads = _tokenize_each([text.text[: text.boundary] for text in texts], are_chat, tokenizer)
    for text, (ids, offsets), (head, head_offsets) in zip(texts, all_tokens, heads, strict=True):
        start, straddles = _target_start(ids, offsets, head, text)
        if not straddles and ids[:start] != head and tokenizer.decode(ids[:start]) == tokenizer.decode(head):
            # line breaks at the end of a text can be one token, and two before a word: train what will be asked
            ids, offsets, start = head + ids[start:], head_offsets + offsets[start:], len(head)
        if straddles and (apart := _apart(head, head_offsets, ids, text, tokenizer)):
            (ids, offsets), start, straddles = apart, len(head), False
        if straddles:
            straddling.append(text.edit)
        if unknown_id in ids and _has_unknown(ids[start:], offsets[start:], text, tokenizer):
            unknown.append(text.edit)
        if not text.in_chat:
            row = ids if ids[-1:] == ending else ids + ending  # a target can end with EOS itself
        else:
            row = _whole_turn(ids, offsets, text.end, turn_ends, ending)
        flat.extend(row)
        begins.append(len(flat))
        starts.append(start)
    if straddling:
        _warn_of_straddling(straddling[0], f"{len(straddling)} of {len(texts)}")
    if unknown:
        _warn_of_unknown(unknown[0], f"{len(unknown)} of {len(texts)}")
    return EncodedEdits(torch.frombuffer(flat, dtype=torch.int32), torch.tensor(begins), torch.tensor(starts))


def _tokenize_each(texts: list[str], are_chat: list[bool], tokenizer: Any) -> Iterator[tuple[list[int], Offsets]]:
    """Yield the token ids and offsets of each text; those of a chat template have their special tokens already."""
    by_kind = {
        is_chat: _tokenize(
            [text for text, other in zip(texts, are_chat, strict=True) if other == is_chat],
            tokenizer,
            add_special_tokens=not is_chat,
        )
        for is_chat in (True, False)
    }
    return (next(by_kind[is_chat]) for is_chat in are_chat)


def _tokenize(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> Iterator[tuple[list[int], Offsets]]:
    if texts and not tokenizer.is_fast:
        found = f"found the slow {type(tokenizer).__name__}, which has no offsets of its tokens"
        raise ValueError(f"tokenizer: {found}; expected a fast one: load it with AutoTokenizer")
    for begin in range(0, len(texts), CHUNK_SIZE):
        with _restored_padding_and_truncation(tokenizer.backend_tokenizer):
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
            # a prompt that begins with BOS, such as one rendered with a chat template, needs no other
            twice = stop > 1 and is_added[0] and ids[0] == ids[1] == tokenizer.bos_token_id
            yield ids[twice:stop], offsets[twice:stop]


@contextmanager
def _restored_padding_and_truncation(backend: Any) -> Iterator[None]:
    # a call without padding and truncation removes the caller's settings in the Rust tokenizer
    padding, truncation = backend.padding, backend.truncation
    try:
        yield
    finally:
        if padding:
            backend.enable_padding(**padding)
        if truncation:
            backend.enable_truncation(**truncation)


def _target_start(ids: list[int], offsets: Offsets, head: list[int], text: _Text) -> tuple[int, bool]:
    """Return the index of the target's first token, and whether it also contains the end of the prompt."""
    _check_offsets(offsets, True, text)
    first = text.text.rindex(text.edit.target.strip(), text.boundary, text.end)
    has_target = any(begin < text.end and end > first for begin, end in reversed(offsets))
    # as evaluation feeds the prompt; without offsets, since some tokens take in the space that follows
    whole_head = ids[: len(head)] == head
    # compare ends: tokenizers differ in whether a token's begin includes the space in front
    start = (
        len(head) if whole_head else next((n for n, (_, end) in enumerate(offsets) if end > text.boundary), len(ids))
    )
    if not has_target or not start or start == len(ids):
        found = f"found no token of the {'prompt' if has_target else 'target'} alone in {text.text!r}"
        raise ValueError(f"{place_of(text.edit)}: {found}; expected at least one: use text that the tokenizer knows")
    if not whole_head:
        same = next((n for n, (one, other) in enumerate(zip(ids, head, strict=False)) if one != other), len(ids))
        _check_offsets(offsets, start >= same, text)
    # if the token before it ends before the prompt does, this token contains the rest, whatever its offsets say
    return start, not whole_head and offsets[start - 1][1] < text.boundary


def _apart(
    head: list[int], head_offsets: Offsets, ids: list[int], text: _Text, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Offsets] | None:
    """Return the tokens of prompt and target tokenized apart, and their offsets; `None` where that changes the text.

    A model that is asked the prompt cannot answer with the token that prompt and target would share.
    """
    if text.in_chat or any(letter.isspace() for letter in text.text[text.boundary - 1 : text.boundary + 1]):
        return None
    # some tokenizers put a space in front of a text; a line break takes it, and no token holds that and the target
    target, offsets = next(_tokenize([f"\n{text.text[text.boundary :]}"], tokenizer, add_special_tokens=False))
    begin = next((n for n, (start, _) in enumerate(offsets) if start >= 1), None)
    if begin is None:
        return None
    whole = head + target[begin:]
    shifted = [(start + text.boundary - 1, end + text.boundary - 1) for start, end in offsets[begin:]]
    same = tokenizer.decode(whole) == tokenizer.decode(ids)
    return (whole, head_offsets + shifted) if same else None


def _check_offsets(offsets: Offsets, are_right: bool, text: _Text) -> None:
    """Refuse offsets that go back, leave the text, or are known to be wrong."""
    ends = [end for _, end in offsets if end]  # special tokens that were added are at (0, 0)
    if not are_right or not ends or ends != sorted(ends) or ends[-1] > len(text.text):
        found = f"found wrong offsets of the tokens of {text.text!r}: {offsets[:8]}"
        raise ValueError(f"{place_of(text.edit)}: {found}; expected each token's place in it: use another tokenizer")


def _has_unknown(ids: list[int], offsets: Offsets, text: _Text, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a target contains text that the tokenizer does not know; refuse one of which it knows nothing."""
    first = text.text.rindex(text.edit.target.strip(), text.boundary, text.end)
    own = [token for token, (begin, end) in zip(ids, offsets, strict=True) if begin < text.end and end > first]
    if tokenizer.unk_token in text.edit.target or tokenizer.unk_token_id not in own:
        return False  # written out, or not in the target
    if set(own) == {tokenizer.unk_token_id}:
        found = f"the tokenizer knows nothing of the target {text.edit.target!r}, only {tokenizer.unk_token!r}"
        raise ValueError(f"{place_of(text.edit)}: {found}; expected text that it knows: use another target")
    return True


def _warn_of_unknown(edit: Edit, share: str) -> None:
    found = f"the tokenizer does not know a part of the target {edit.target!r} (in {share} edits)"
    warnings.warn(f"{place_of(edit)}: {found}; the model cannot answer it: use another target", stacklevel=4)


def _warn_of_straddling(edit: Edit, share: str) -> None:
    found = f"found a token shared by {edit.prompt!r} and {edit.target!r} (in {share} edits); it is scored"
    advice = "remove whitespace from the end of the prompt, or of the text that the chat template puts before answers"
    warnings.warn(f"{place_of(edit)}: {found}: {advice}", stacklevel=4)


def _whole_turn(ids: list[int], offsets: Offsets, end: int, turn_ends: set[int], ending: list[int]) -> list[int]:
    """Return the ids up to the special token that ends the turn; without one, up to the target, and `ending`."""
    after = next((index for index, (begin, _) in enumerate(offsets) if begin >= end), len(ids))
    turn_end = next((index for index in range(after, len(ids)) if ids[index] in turn_ends), None)
    return ids[:after] + ending if turn_end is None else ids[: turn_end + 1]


def _check_lengths(lengths: torch.Tensor, edits: Sequence[Edit], max_length: int) -> None:
    too_long = (lengths > max_length).nonzero().flatten().tolist()
    if too_long:
        head = f"{len(too_long)} of {len(edits)} edits are longer than max_length={max_length} tokens. The first:"
        first = [f"  {place_of(edits[index])}: {lengths[index]}" for index in too_long[:5]]
        advice = "Shorten or remove them, or increase max_length up to the model's positions."
        raise ValueError("\n".join([head, *first, advice]))
