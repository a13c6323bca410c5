"""A scope inside a model: its deltas act in sequences that name an edited subject, and nowhere else."""

from __future__ import annotations

import functools
import inspect
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..data.edit_types import fold_case
from ..engine.model_state import check_model_and_tokenizer
from ..tuner.model import LocFTModel, locft_layers
from ..tuner.token_gate import UNGATED, TokenGate, has_ungated_parts
from .scope import Scope

STATE = "locft_sequences"  # the attribute of a KV cache
PAD = -1
NEVER = 2**62
MOST_TOKENS_OF_A_CHARACTER = 4  # its bytes
CACHES = ("cache", "past_key_values", "cache_params")  # names in transformers, the newest first
REORDERING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


def apply_scope(
    model: PeftModel, tokenizer: Any, scope: Scope | str | os.PathLike[str], *, whole_prompt: bool = True
) -> AppliedScope:
    """Let the deltas of a model act only in sequences that name a subject.

    A sequence that names none is the base's, bit for bit: read at once or in parts, alone or in a batch, with a KV
    cache or without. A prompt that names one is answered as without a scope. If the model itself comes to name one,
    the deltas act from its next token on. What earlier forwards have put into the KV cache stays as it is.

    The scope holds for `forward` and `generate` of this model, and for all of its adapters. Beam search needs
    `use_cache=False`. A merged model has no scope.

    Args:
        model: a PEFT model with LocFT adapters, of a decoder-only language model.
        tokenizer: its tokenizer.
        scope: the subjects, or a local adapter folder that has a scope.
        whole_prompt: let the deltas act at every token of a prompt that names a subject, as they did in training.
            `False`: from the last token of the first name on; what stands before is the base's. Adapters that were
            trained without a scope generalize a little less then.

    Returns:
        The applied scope; `remove()` takes it off.

    Raises:
        ValueError: if the model has no LocFT adapter, has a scope already, is merged, or is not decoder-only; if an
            adapter has `modules_to_save` or `trainable_token_indices`; or as in `Scope.load`.

    Example:
        >>> model = PeftModel.from_pretrained(base, "out")
        >>> apply_scope(model, tokenizer, "out")
        >>> model.generate(**tokenizer("The capital of Sweden is", return_tensors="pt"))  # the base's answer
    """
    check_model_and_tokenizer(model, tokenizer, "apply_scope")
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, LocFTModel):
        raise ValueError(f"apply_scope: found a {type(model).__name__} without a LocFT adapter; load one first.")
    if tuner.gate is not None:
        raise ValueError("apply_scope: this model has a scope already. Call remove() of that one first.")
    base = model.get_base_model()
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"apply_scope: {type(base).__name__} has an encoder; a scope needs a decoder-only model.")
    ungated = next((name for name, config in tuner.peft_config.items() if has_ungated_parts(config)), None)
    if ungated is not None:
        raise ValueError(f"apply_scope: adapter '{ungated}' {UNGATED}.")
    if any(layer.merged for layer in tuner._tuner_layers()):
        raise ValueError("apply_scope: the adapter is merged, and a merged model has no scope. Call unmerge first.")
    loaded = scope if isinstance(scope, Scope) else Scope.load(scope)
    return AppliedScope(tuner, base, tokenizer, loaded, whole_prompt)


class AppliedScope:
    """A scope that a model has; see [`apply_scope`]. As a context manager, it is taken off at the end.

    Args:
        tuner: the model's tuner.
        base: the model inside it.
        tokenizer: its tokenizer.
        scope: the subjects.
        whole_prompt: as in `apply_scope`.
    """

    def __init__(
        self, tuner: LocFTModel, base: PreTrainedModel, tokenizer: Any, scope: Scope, whole_prompt: bool
    ) -> None:
        self.scope, self.whole_prompt = scope, whole_prompt
        self._tuner, self._base, self._tokenizer = tuner, base, tokenizer
        self._gate = TokenGate()
        self._layers = [layer for _, layer in locft_layers(base)]
        # accelerate's hooks set a forward on the instance
        self._own_forward = vars(base).get("forward")
        self._forward = base.forward
        self._signature = inspect.signature(base.forward)
        base.forward = functools.update_wrapper(functools.partial(self._scoped_forward), self._forward)
        tuner.set_gate(self._gate)

    def remove(self) -> None:
        """Let the deltas act at every token again."""
        if self._tuner.gate is not self._gate:
            return
        self._tuner.set_gate(None)
        del self._base.forward
        if self._own_forward is not None:
            self._base.forward = self._own_forward

    def __enter__(self) -> AppliedScope:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"AppliedScope({len(self.scope.subjects)} subjects)"

    def _scoped_forward(self, *args: Any, **kwargs: Any) -> Any:
        if any(layer.disable_adapters for layer in self._layers):
            return self._forward(*args, **kwargs)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        given = bound | bound.pop("kwargs", {})
        input_ids, attended = _checked(given)
        cache = _cache_in(given)
        sequences = _sequences_of(cache, len(input_ids))
        is_prompt = input_ids.shape[1] > 1 or not sequences.num_slots
        sequences.add(input_ids, attended)
        firsts = self._firsts(sequences, input_ids.shape[1], is_prompt)
        with self._gate.open_at(firsts, input_ids.shape[1], input_ids.device):
            outputs = self._forward(*args, **kwargs)
        cache = _cache_in(outputs) if cache is None and isinstance(outputs, ModelOutput) else cache
        if cache is not None:
            sequences.attach(cache)
        return outputs

    def _firsts(self, sequences: Sequences, num_new: int, is_prompt: bool) -> list[int]:
        """Return for each sequence the first of its new tokens from which the deltas act."""
        seen = sequences.num_slots - num_new
        for number, slots in enumerate(sequences.slots):
            if sequences.since[number] is None:
                sequences.since[number] = self._first_named(slots, seen, is_prompt)
        named = [NEVER if since is None else max(0, since - seen) for since in sequences.since]
        return [0 if self.whole_prompt and first < num_new else first for first in named]

    def _first_named(self, slots: Sequence[int], seen: int, is_prompt: bool) -> int | None:
        """Return the slot at which a sequence has named a subject; `None`: it has named none.

        Args:
            slots: token ids; `PAD`: none.
            seen: slots that earlier forwards have searched.
            is_prompt: a name at the end counts.
        """
        reach = MOST_TOKENS_OF_A_CHARACTER * (max(self.scope.lengths, default=0) + 2)
        begin = max(0, seen - reach)
        tokens = [(slot, token) for slot, token in enumerate(slots[begin:], begin) if token != PAD]
        ids = [token for _, token in tokens]
        said = self._text(ids)
        text = fold_case(said)
        # the first word may have begun before; behind a space, the last one has ended
        end = self.scope.first_end(text, begin=1 if begin else 0, is_whole=is_prompt or said[-1:].isspace())
        if end is None:
            return None
        number = bisect_left(
            range(1, len(ids)), True, key=lambda n: fold_case(self._text(ids[:n]))[:end] == text[:end]
        )
        return tokens[number][0]

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text


@dataclass
class Sequences:
    """What the sequences of a batch have said so far. It is kept on their KV cache, and copied with it.

    Args:
        slots: for each sequence, the token id of every slot of the cache; `PAD`: none.
        since: for each, the slot from which the deltas act; `None`: it has named no subject.
    """

    slots: list[list[int]]
    since: list[int | None]

    @property
    def num_slots(self) -> int:
        return len(self.slots[0])

    def add(self, input_ids: torch.Tensor, attended: torch.Tensor | None) -> None:
        """Append tokens, (B, T), of which some may be padding."""
        new = input_ids if attended is None else input_ids.masked_fill(~attended, PAD)
        self.slots = [[*old, *row] for old, row in zip(self.slots, new.tolist(), strict=True)]

    def cut(self, length: int) -> None:
        """Forget what stands behind some slots, as a cropped cache does."""
        self.slots = [row[:length] for row in self.slots]
        self.since = [None if since is None or since >= length else since for since in self.since]

    def attach(self, cache: Any) -> None:
        """Keep this on a cache, and refuse what would change the order of its sequences."""
        setattr(cache, STATE, self)
        for name in REORDERING:
            if hasattr(cache, name):
                setattr(cache, name, _refuse_order)


def _refuse_order(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "A scope follows each sequence by its place in the KV cache, and beam search changes the places. Generate "
        "with num_beams=1, or with use_cache=False."
    )


def _sequences_of(cache: Any, num_sequences: int) -> Sequences:
    """Return what the sequences of a cache have said; empty without a cache.

    Raises:
        ValueError: if a forward without the scope has filled the cache, or the number of sequences is another one.
    """
    kept = getattr(cache, STATE, None)
    length = 0 if cache is None else _num_slots(cache, kept)
    if not length:
        return Sequences([[] for _ in range(num_sequences)], [None] * num_sequences)
    if kept is None or kept.num_slots < length or len(kept.slots) != num_sequences:
        found = "no tokens" if kept is None else f"{kept.num_slots} tokens of {len(kept.slots)} sequences"
        raise ValueError(
            f"The KV cache has {length} tokens of {num_sequences} sequences, and the scope has seen {found} of it. "
            "Read the whole text with the scope applied and the adapter active."
        )
    kept.cut(length)
    return Sequences(kept.slots, list(kept.since))


def _num_slots(cache: Any, kept: Sequences | None) -> int:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # recurrent states have no length
        return kept.num_slots if kept is not None else int(cache.has_previous_state())


def _cache_in(named: Mapping[str, Any]) -> Any:
    found = (named[name] for name in CACHES if name in named and named[name] is not None)
    return next(found, None)


def _checked(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the token ids of a forward, (B, T), and which are no padding.

    Raises:
        ValueError: if they cannot be told from the arguments.
    """
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    if input_ids is None or given.get("inputs_embeds") is not None:
        raise ValueError("A scope reads the text of each sequence: found no input_ids; expected them in each forward.")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        found = str(tuple(mask.shape)) if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        advice = "If it is that of a static cache, generate with the default cache."
        raise ValueError(f"A scope needs an attention_mask of (B, T), as tokenizers return: found {found}. {advice}")
    positions = given.get("position_ids")
    if positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError(
            "A scope cannot tell apart sequences that are packed into one row: found position_ids that fall."
        )
    length = input_ids.shape[1]
    return input_ids, None if mask is None else mask[:, -length:].bool()
