"""Prompts as the model sees them: whatever they are padded to, and without the adapter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import randomize
from tiny_training import EDITS, base_model, peft_model
from tokenizers_for_tests import make_tokenizer
from torch.nn.functional import cosine_similarity, normalize

from peft_locft import encode_prompts
from peft_locft.data import prompt_similarity
from peft_locft.data.prompt_similarity import embed_prompts, nearest_prompts

PROMPTS = [edit.prompt for edit in EDITS]


def test_an_embedding_is_the_mean_direction_of_a_prompts_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    found = embed_prompts(model, tokenizer, PROMPTS)
    assert found.shape == (len(PROMPTS), 32) and found.dtype == torch.float32
    for row, ids in zip(found, encode_prompts(PROMPTS, tokenizer), strict=True):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(row, normalize(states, dim=-1).mean(dim=0))
    monkeypatch.setattr(prompt_similarity, "TOKENS_IN_A_FORWARD", 1)
    torch.testing.assert_close(embed_prompts(model, tokenizer, PROMPTS), found)
    edited = peft_model()
    randomize(edited, std=2.0)
    torch.testing.assert_close(embed_prompts(edited, tokenizer, PROMPTS), found)


def test_the_nearest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    candidates = ["Dave plays", *PROMPTS[1:], "the river"]
    states = embed_prompts(model, tokenizer, candidates)
    centre = states.mean(dim=0)
    asked = embed_prompts(model, tokenizer, PROMPTS[:3]) - centre
    best = torch.stack([cosine_similarity(state - centre, asked).max() for state in states])
    order = sorted(range(len(candidates)), key=lambda number: -best[number])
    monkeypatch.setattr(prompt_similarity, "EDITS_AT_ONCE", 2)
    found = nearest_prompts(model, tokenizer, PROMPTS[:3], candidates, 5)
    assert found[2:] == order[2:5]
    assert set(found[:2]) == {1, 2}  # the prompts themselves
