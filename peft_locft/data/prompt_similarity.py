"""Similarity of prompts, by the hidden states of the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from ..engine.model_state import as_base, evaluating
from ..engine.padding import batches_by_length, pad_right
from ..engine.tail import logits_at
from .encoding import encode_prompts

TOKENS_IN_A_FORWARD = 2048
EDITS_AT_ONCE = 256


def embed_prompts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> torch.Tensor:
    """Return an embedding per prompt: the mean of its normalized hidden states in the middle of the base model.

    Each token's state is normalized to length 1 first: the first token's is larger by orders of magnitude in most
    models and does not depend on the text.

    Args:
        model: a decoder-only language model; its adapter is disabled meanwhile.
        tokenizer: its tokenizer, a fast one.
        prompts: N texts.

    Returns:
        (N, hidden size) float32, on the CPU.
    """
    rows = [torch.tensor(ids) for ids in encode_prompts(prompts, tokenizer)]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    embedded: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with as_base(model), evaluating(model):
        for batch in batches_by_length([len(row) for row in rows], TOKENS_IN_A_FORWARD):
            ids, mask = pad_right([rows[number] for number in batch], device)
            inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
            first = torch.zeros(1, dtype=torch.int64, device=device)
            states = logits_at(model, first, first, inputs).hidden_states  # logits of one token, unused
            half = normalize(states[len(states) // 2].float(), dim=-1)
            means = (half * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            for number, mean in zip(batch, means.cpu(), strict=True):
                embedded[number] = mean
    return torch.stack(embedded)


def nearest_prompts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], candidates: Sequence[str], num: int
) -> list[int]:
    """Return the indices of the `num` candidates most similar to any of the prompts, the most similar first.

    The similarity is the cosine of [`embed_prompts`] minus the candidates' mean, since all hidden states of a model
    share a large part that does not depend on the text. Ties keep the order of the candidates.

    Args:
        model: as in `embed_prompts`.
        tokenizer: as in `embed_prompts`.
        prompts: at least one.
        candidates: at least `num`.
        num: number of candidates to return.
    """
    states = embed_prompts(model, tokenizer, candidates)
    centre = states.mean(dim=0)
    unit = normalize(states - centre, dim=1)
    of_prompts = normalize(embed_prompts(model, tokenizer, prompts) - centre, dim=1)
    best = torch.full((len(unit),), -torch.inf)
    for some in of_prompts.split(EDITS_AT_ONCE):
        best = torch.maximum(best, (unit @ some.T).amax(dim=1))
    return best.argsort(descending=True, stable=True)[:num].tolist()
