"""A model whose answers follow a script, so that scores can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

# for each prompt, texts that follow it, with the weight added to the logits of their tokens
Script = Mapping[str, Mapping[str, float]]


class ScriptedConfig(PretrainedConfig):
    model_type = "scripted"


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """Its logits are 0, plus the weight of each script line that begins with the tokens so far, on its next token."""

    config_class = ScriptedConfig

    def __init__(self, script: Script, tokenizer: Any, *, ends: bool = True, poison: str = "") -> None:
        super().__init__(
            ScriptedConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, num_hidden_layers=1)
        )
        self.embedding = nn.Embedding(len(tokenizer), 2)
        end = [tokenizer.eos_token_id] if ends else []
        self.poison = tokenizer(poison)["input_ids"] if poison else None
        self.lines = [
            (tokenizer(prompt + text)["input_ids"] + end, weight)
            for prompt, texts in script.items()
            for text, weight in texts.items()
        ]

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs["attention_mask"]}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for row, (tokens, seen) in enumerate(zip(input_ids.tolist(), mask.bool().tolist(), strict=True)):
            for column in range(len(tokens)):
                so_far = [token for token, is_token in zip(tokens[: column + 1], seen, strict=False) if is_token]
                for line, weight in self.lines:
                    if line[: len(so_far)] == so_far and len(line) > len(so_far):
                        logits[row, column, line[len(so_far)]] += weight
                if so_far == self.poison:
                    logits[row, column] = float("nan")
        return CausalLMOutput(logits=logits)
