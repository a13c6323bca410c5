"""No short cut of the engine is believed: what does not give the model's own numbers is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import LLAMA_LIKE, TOKENS, build, randomize
from tiny_training import EDITS, TOKENIZER_SIZE, make_trainer
from tokenizers_for_tests import make_tokenizer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DiffLlamaConfig,
    FalconConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    Phi3Config,
    PretrainedConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_locft.engine.checks as engine_checks
from peft_locft import Edit, EvaluationConfig, LocFTConfig, encode_edits, evaluate_edits
from peft_locft.engine.attention_probe import why_not_packed
from peft_locft.engine.checks import checks_of, find_layout, why_not_laid_out
from peft_locft.engine.decoding import find_way, generate_and_score
from peft_locft.engine.forward_plan import ForwardPlan
from peft_locft.engine.questions import Question, StopCounter
from peft_locft.engine.tail import Tail
from peft_locft.tuner import find_decoder_layers

CPU = torch.device("cpu")
SIZES = LLAMA_LIKE | {"vocab_size": TOKENIZER_SIZE}
WITHOUT_GROUPS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
TOKENIZER = make_tokenizer("llama2")

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: BloomConfig(vocab_size=TOKENIZER_SIZE, hidden_size=32, n_layer=3, n_head=4, **TOKENS),
    "diffllama": lambda: DiffLlamaConfig(**SIZES),
    "falcon": lambda: FalconConfig(**WITHOUT_GROUPS),
    "gemma2 eager": lambda: Gemma2Config(**SIZES, head_dim=8, attn_implementation="eager"),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "lfm2": lambda: Lfm2Config(**SIZES, block_multiple_of=8, layer_types=["conv", "full_attention", "conv"]),
    "llama4": lambda: Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=20
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=TOKENIZER_SIZE, hidden_size=32, num_hidden_layers=3, state_size=8, **TOKENS
    ),
    "rwkv": lambda: RwkvConfig(
        vocab_size=TOKENIZER_SIZE,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        context_length=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def layout_of(model: Any, longest: int = 10) -> str:
    """Return how training lays out edits of at most `longest` tokens."""
    checks = checks_of(model, CPU, longest)
    plan = ForwardPlan(Tail(find_decoder_layers(model)[1], 0), checks.trial.tree, CPU)
    return find_layout(model, plan, checks, ("packed", "padded", "masked"), longest).layout


def way_of(model: Any, longest: int = 10) -> str:
    """Return how the model answers."""
    return find_way(model, checks_of(model, CPU, longest), StopCounter(TOKENIZER), longest)


@torch.no_grad()
def own_losses(model: Any, edits: list[Edit]) -> list[float]:
    """Return the loss of each edit from a forward on it alone, unpadded."""
    encoded = encode_edits(edits, TOKENIZER)
    losses = []
    for row in range(len(encoded)):
        ids, start = encoded[row].input_ids, encoded[row].target_start
        logits = model(input_ids=ids[None], attention_mask=torch.ones(1, len(ids)), use_cache=False).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1].float(), ids[start:]).item())
    return losses


def first_loss(folder: Path, model: Any, edits: list[Edit] = EDITS, **arguments: Any) -> tuple[float, Any]:
    trainer = make_trainer(folder, model, edits, num_train_epochs=1, learning_rate=0.0, **arguments)
    trainer.train()
    return trainer.epoch_losses[0], trainer


# ---------------------------------------------------------------------- what is used for which model


@pytest.mark.parametrize(
    ("name", "layout", "way"),
    [
        ("bloom", "padded", "left-padded"),  # attention of its own
        ("diffllama", "packed", "packed"),  # attends twice in a layer
        ("falcon", "padded", "left-padded"),  # layers return tuples
        ("gemma2 eager", "padded", "left-padded"),  # soft caps, which packed attention does not have
        ("gpt_oss", "padded", "left-padded"),  # attention sinks
        ("lfm2", "padded", "left-padded"),  # convolutions run over the edges of edits
        ("llama4", "padded", "left-padded"),  # attends in chunks
        ("mamba", "padded", "left-padded"),  # a state
        ("rwkv", "padded", "alone"),  # a state that padding, and a batch, change
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_used(name: str, layout: str, way: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    assert (layout_of(model), way_of(model)) == (layout, way)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("max_tokens", [None, 1], ids=["any micro-batch", "one edit a micro-batch"])
def test_training_has_the_models_own_losses(name: str, max_tokens: int | None, tmp_path: Path) -> None:
    model = get_peft_model(model_of(name), LocFTConfig(task_type="CAUSAL_LM"))
    own = sum(own_losses(model, EDITS)) / len(EDITS)
    found, trainer = first_loss(tmp_path, model, max_tokens_per_micro_batch=max_tokens)
    assert found == pytest.approx(own, rel=1e-5)
    assert trainer.runner.plan.states is not None


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("num", [1, 4])
def test_answers_are_the_models_own(name: str, num: int) -> None:
    model = model_of(name)
    questions = [Question(tuple(range(5, 8 + 3 * number)), num_stops=0, max_new_tokens=5) for number in range(num)]
    for question, answer in zip(questions, generate_and_score(model, TOKENIZER, questions), strict=True):
        ids = list(question.prompt)
        for token in answer.token_ids:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert logits[token] == pytest.approx(float(logits.max()), abs=1e-4)
            ids.append(token)


# ---------------------------------------------------------------------- refused


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(**WITHOUT_GROUPS)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"BertLMHeadModel is not causal: later tokens change the logits"):
        evaluate_edits(model, TOKENIZER, EDITS[:2], EvaluationConfig(max_new_tokens=2), progress=False)
    edited = get_peft_model(model, LocFTConfig(target_modules=["intermediate.dense"], layers_to_transform=[1]))
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        make_trainer(tmp_path, edited).train()


def test_a_decoder_that_attends_in_both_directions_is_refused() -> None:
    model = build("llama")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="not causal"):
        generate_and_score(model, TOKENIZER, [Question((3, 4, 5))])


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(
        vocab_size=TOKENIZER_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration does not run on token ids alone: .*decoder"):
        generate_and_score(T5ForConditionalGeneration(config).eval(), TOKENIZER, [Question((3, 4, 5))])


# ---------------------------------------------------------------------- where there is no float32


class Int8Linear(nn.Module):
    """Computes in bfloat16 whatever it gets, as quantized layers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scales = linear.weight.float().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scales).round().to(torch.int8), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = (self.weight * self.scales).bfloat16()
        return nn.functional.linear(states.bfloat16(), weight).to(states.dtype)


def quantized(model: Any) -> Any:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child is not model.get_output_embeddings():
                setattr(module, name, Int8Linear(child))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_quantized_model_is_compared_in_its_own_dtype(dtype: torch.dtype) -> None:
    model = quantized(build("llama", dtype))
    trial = checks_of(model, CPU, 10).trial
    assert not trial.is_float32 and trial.is_consistent
    assert (layout_of(model), way_of(model)) == ("packed", "packed")


@pytest.mark.parametrize("name", ["lfm2", "bloom", "gpt_oss"])
def test_a_quantized_model_that_cannot_be_packed_is_not(name: str) -> None:
    assert layout_of(quantized(model_of(name, torch.bfloat16))) == "padded"


def test_sequences_that_change_each_other_are_found_below_the_rounding() -> None:
    model = model_of("lfm2", torch.bfloat16)
    checks = checks_of(model, CPU, 10, is_sharded=True)
    # as of a deep model
    checks.trial = replace(checks.trial, bound=2.0)
    plan = ForwardPlan(Tail(find_decoder_layers(model)[1], 0), checks.trial.tree, CPU)
    why = why_not_laid_out(model, plan, checks)
    assert why is not None and why.startswith("packed sequences change each other's logits")


def test_a_quantized_encoder_is_refused() -> None:
    model = quantized(AutoModelForCausalLM.from_config(BertConfig(**WITHOUT_GROUPS)).eval())
    with pytest.raises(ValueError, match="not causal"):
        layout_of(model)


# ---------------------------------------------------------------------- the checks themselves


def count_forwards(model: Any) -> list[int]:
    forwards: list[int] = []
    model.register_forward_hook(lambda module, args, output: forwards.append(1))
    return forwards


def test_a_model_is_checked_once() -> None:
    model = build("llama")
    forwards = count_forwards(model)
    layout_of(model), way_of(model)
    first = len(forwards)
    # another adapter changes weights, not how tokens act on each other
    edited = get_peft_model(model, LocFTConfig())
    randomize(edited)
    assert (layout_of(edited), way_of(edited)) == ("packed", "packed")
    assert 0 < first == len(forwards)


def test_what_was_found_before_training_holds_after_it() -> None:
    edited = get_peft_model(build("llama"), LocFTConfig())
    assert layout_of(edited) == "packed"
    randomize(edited, std=0.5)
    # a new check, against what the model says now
    assert way_of(edited) == "packed"


def test_another_configuration_is_checked_anew() -> None:
    model = build("llama")
    forwards = count_forwards(model)
    layout_of(model)
    first = len(forwards)
    model.set_attn_implementation("eager")
    layout_of(model)
    second = len(forwards)
    layout_of(model.to(torch.bfloat16))
    assert first < second < len(forwards)


def test_a_model_with_nan_is_not_remembered() -> None:
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    before = weight.clone()
    weight[:] = float("nan")
    assert layout_of(model) == "single"
    weight.copy_(before)
    assert layout_of(model) == "packed"


def test_a_check_that_raises_means_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: Any) -> None:
        raise KeyError("nothing of the kind")

    monkeypatch.setattr(engine_checks, "why_not_packed", fail)
    with caplog.at_level(logging.INFO, logger="peft_locft"):
        assert layout_of(build("llama")) == "padded"
    assert "LlamaForCausalLM does without packed edits: KeyError: 'nothing of the kind'." in caplog.messages


@pytest.mark.parametrize("layouts", [("padded", "masked"), ("masked",)])
def test_where_padding_is_wrong_edits_run_alone(layouts: tuple[Any, ...], tmp_path: Path) -> None:
    model = build("llama", vocab_size=TOKENIZER_SIZE)

    def mix_rows(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.sum(dim=0, keepdim=True) if len(output) > 1 else output

    model.model.layers[1].mlp.register_forward_hook(mix_rows)
    checks = checks_of(model, CPU, 10)
    plan = ForwardPlan(Tail(model.model.layers, 0), checks.trial.tree, CPU)
    assert find_layout(model, plan, checks, layouts, longest=10).layout == "single"
    edited = get_peft_model(model, LocFTConfig(task_type="CAUSAL_LM"))
    off, trainer = first_loss(tmp_path, edited, activation_cache="off")
    assert trainer.runner.plan.layout == "single"
    assert off == pytest.approx(sum(own_losses(model, EDITS)) / len(EDITS), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bloom", "it does not use transformers' attention interface"),
        ("gemma2 eager", "its attention takes softcap"),
        ("gpt_oss", "its attention takes s_aux"),
        ("llama4", "its attention mask is neither causal nor a sliding window"),
    ],
)
def test_attention_that_cannot_be_packed_is_known_from_the_structure(name: str, why: str) -> None:
    model = model_of(name)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "use_cache": False}
    found = why_not_packed(model, find_decoder_layers(model)[1], inputs, num_positions=64)
    assert found == why


def test_rope_that_depends_on_the_longest_edit_keeps_edits_apart(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    config = Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    edits = [Edit(prompt="The king", target="Dave"), Edit(prompt="The river " * 7 + "is", target="Dave")]
    lengths = encode_edits(edits, TOKENIZER).lengths
    assert lengths.min() < 16 < lengths.max()
    assert layout_of(model, longest=16) == way_of(model, longest=16) == "packed"
    assert (layout_of(model, longest=17), way_of(model, longest=17)) == ("single", "whole")
    edited = get_peft_model(model, LocFTConfig(task_type="CAUSAL_LM"))
    found, _ = first_loss(tmp_path, edited, edits)
    assert found == pytest.approx(sum(own_losses(model, edits)) / len(edits), rel=1e-5)
