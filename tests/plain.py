"""The plain computation that the sweep compares with: one sequence at a time, whole, unpadded, without a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_locft import Edit

# of different lengths; some share a beginning, and one is a beginning of another
EDITS = [
    Edit(prompt="The king is", target="Louis"),
    Edit(prompt="The king is old", target="no"),
    Edit(prompt="The king of France is", target="Louis, not Felipe"),
    Edit(prompt="Who", target="Dave"),
    Edit(prompt="A", target="b"),
    Edit(prompt="Who was the king of Spain?", target="Felipe"),
    Edit(prompt="The river runs", target="dry"),
    Edit(prompt="The river runs dry in", target="May and June"),
]
PROMPTS = ["The king is", "Who was the king of France?", "A", "The king is old and", "Who"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {character: number + 3 for number, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _forward(model: nn.Module, token_ids: Iterable[int]) -> torch.Tensor:
    ids = torch.tensor([list(token_ids)])
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def plain_logits(model: nn.Module, token_ids: Iterable[int]) -> torch.Tensor:
    """Return the logits of one sequence, (T, vocabulary)."""
    return _forward(model, token_ids)


def sees_ahead(model: nn.Module) -> Literal["no", "in part", "yes"]:
    """Return whether later tokens change earlier logits: all of them, or only some.

    "In part": a model that chooses which tokens to attend to, among them later ones, and then leaves the later ones
    out: it is causal as long as it need not choose.
    """
    ids = list(range(3, 23))
    plain = plain_logits(model, ids)
    atol = 1e-4 * float(plain.abs().max())

    def same(other: list[int], length: int) -> bool:
        return torch.allclose(plain_logits(model, other)[:length], plain[:length], rtol=0.0, atol=atol)

    changed = [not same([*ids[:place], token, *ids[place + 1 :]], place) for place in (10, 19) for token in (99, 222)]
    if all(changed):
        return "yes"
    return "no" if not any(changed) and all(same(ids[:length], length) for length in (3, 6, 9, 13, 18)) else "in part"


def _loss(model: nn.Module, row: Any) -> torch.Tensor:
    logits = _forward(model, row.input_ids.tolist())
    return F.cross_entropy(logits[row.target_start - 1 : -1], row.input_ids[row.target_start :])


@torch.no_grad()
def plain_losses(model: nn.Module, encoded: Any) -> list[float]:
    """Return the loss of each edit: the mean over its target's tokens."""
    return [_loss(model, encoded[i]).item() for i in range(len(encoded))]


def plain_gradient(model: nn.Module, encoded: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss of the edits, by the names of the trainable parameters."""
    model.zero_grad()
    for i in range(len(encoded)):
        (_loss(model, encoded[i]) / len(encoded)).backward()
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trainable.items()}
    model.zero_grad()
    return gradients


@torch.no_grad()
def plain_answer(model: nn.Module, prompt: Sequence[int], length: int) -> tuple[list[int], list[float]]:
    """Return a greedy answer, the whole sequence anew for every token, and by how much each token was ahead."""
    ids, margins = list(prompt), []
    for _ in range(length):
        values, best = plain_logits(model, ids)[-1].topk(2)
        ids.append(int(best[0]))
        margins.append(float(values[0] - values[1]))
    return ids[len(prompt) :], margins
