"""Which tokens write into the delta, and that its gradient is made of their inputs alone."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_training import EDITS, make_trainer, peft_model, trained
from tokenizers_for_tests import make_tokenizer
from torch import nn

from peft_locft import Edit, LocFTConfig
from peft_locft.data.encoding import encode_edits, join_encoded, prompts_writing, slice_encoded
from peft_locft.data.gradient_tokens import GradientTokens, subject_spans
from peft_locft.training.objectives import labels_for
from peft_locft.tuner.layer import LocFTLayer

SUBJECTS = ("France", "Spain", "Spain", "France", "river", "Dave", "city", "city")
WITH_SUBJECTS = [
    Edit(prompt=edit.prompt, target=edit.target, subject=subject)
    for edit, subject in zip(EDITS, SUBJECTS, strict=True)
]
MODES: tuple[GradientTokens, ...] = ("prompt", "subject", "from_subject")
DOWN = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 1], task_type="CAUSAL_LM")


def written(edit: Edit, mode: GradientTokens, **arguments: Any) -> list[str]:
    """Return the pieces of the text whose tokens write."""
    tokenizer = make_tokenizer(arguments.pop("tokenizer", "gpt2"))
    encoded = encode_edits([edit], tokenizer, gradient_tokens=mode, **arguments)
    assert encoded.writes is not None
    ids = encoded.token_ids.tolist()
    pieces: list[str] = []
    for place, (token, writes) in enumerate(zip(ids, encoded.writes.tolist(), strict=True)):
        if writes:
            before = pieces[-1] if pieces and encoded.writes[place - 1] else None
            text = tokenizer.decode([token])
            pieces[-1:] = [before + text] if before is not None else [*pieces[-1:], text]
    return pieces


def test_tokens_of_a_prompt_by_mode() -> None:
    edit = Edit(prompt="The capital of France is", target="Madrid", subject="France")
    assert written(edit, "prompt") == ["The capital of France is"]
    (subject,) = written(edit, "subject")
    assert "France".endswith(subject.strip())
    (rest,) = written(edit, "from_subject")
    assert rest == f"{subject} is"


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama2", "gemma"])
def test_last_token_of_a_subject_of_several_tokens(tokenizer: str) -> None:
    edit = Edit(prompt="In the city, the river Dave is", target="Madrid", subject="the river Dave")
    (subject,) = written(edit, "subject", tokenizer=tokenizer)
    assert "dave".endswith(subject.strip().lower())


def test_every_mention_writes_and_the_first_begins_the_rest() -> None:
    edit = Edit(prompt="France: the capital of France is", target="Madrid", subject="France")
    assert len(written(edit, "subject")) == 2
    (rest,) = written(edit, "from_subject")
    assert rest.endswith(": the capital of France is")


def test_a_subject_that_is_part_of_a_longer_word_is_passed_over() -> None:
    assert subject_spans("art", "The start of art is", 0, 19) == [(13, 16)]
    assert subject_spans("France", "the capital of france", 0, 21) == [(15, 21)]
    assert subject_spans("法国", "法国的首都是", 0, 6) == [(0, 2)]
    assert subject_spans(None, "France", 0, 6) == subject_spans(" ", "France", 0, 6) == []


def test_without_a_subject_the_prompt_writes() -> None:
    edit = Edit(prompt="The capital of France is", target="Madrid")
    for mode in MODES:
        assert written(edit, mode) == ["The capital of France is"]


def test_in_chat_what_stands_before_the_prompt_does_not_write() -> None:
    edit = Edit(prompt="Who is the king of Spain?", target="Louis", subject="Spain")
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }} Spain]\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant Spain]\n{% endif %}"
    )
    encoded = encode_edits([edit], tokenizer, gradient_tokens="from_subject", chat_template=True)
    assert encoded.writes is not None
    text = tokenizer.decode(encoded.token_ids[encoded.writes])
    assert text.count("[assistant") == 1 and "[user" not in text and "Louis" not in text


def test_marks_follow_their_rows() -> None:
    tokenizer = make_tokenizer("gpt2")
    marked = encode_edits(WITH_SUBJECTS, tokenizer, gradient_tokens="subject")
    plain = encode_edits(WITH_SUBJECTS[:2], tokenizer)
    joined = join_encoded([plain, marked])
    assert joined.writes is not None and marked.writes is not None
    assert joined.writes[: len(plain.token_ids)].all()
    back = slice_encoded(joined, 2, None)
    assert back.writes is not None and torch.equal(back.writes, marked.writes)


def test_prompts_write_with_subjects_of_their_own() -> None:
    tokenizer = make_tokenizer("gpt2")
    (own,) = prompts_writing(["The capital of Spain is"], ["Spain"], tokenizer, "subject")
    edit = encode_edits([Edit(prompt="The capital of Spain is", target="x", subject="Spain")], tokenizer,
                        gradient_tokens="subject")  # fmt: skip
    assert edit.writes is not None
    assert own == edit.writes[: len(own)].tolist() and sum(own) == 1


# ---------------------------------------------------------------------- the law


class MaskedGradients:
    """Sums the gradient of each delta over the marked tokens of a row, `Σ g kᵀ`, as a plain loop computes it.

    All tokens are marked for modules that are not among `modules`.
    """

    def __init__(self, model: nn.Module, modules: Container[str] | None) -> None:
        self.modules = modules
        self.sums: dict[str, torch.Tensor] = {}
        self.marks = torch.zeros(0)
        self.handles = [
            layer.register_forward_hook(partial(self.note, name))
            for name, layer in model.named_modules()
            if isinstance(layer, LocFTLayer)
        ]

    def note(self, name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.register_hook(partial(self.add, name, args[0].detach()[0]))

    def add(self, name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        marks = self.marks if self.modules is None or name in self.modules else torch.ones_like(self.marks)
        own = gradient[0][marks].T @ inputs[marks]
        self.sums[name] = self.sums[name] + own if name in self.sums else own


def plain_gradients(
    model: Any, trainer: Any, rows: list[int], modules: Container[str] | None
) -> dict[str, torch.Tensor]:
    """Return the masked gradient of each delta, one unpadded row after the other."""
    encoded = trainer.data.encoded
    found = MaskedGradients(model, modules)
    for index in rows:
        row = encoded[index]
        begin, end = encoded.offsets[index : index + 2].tolist()
        found.marks = encoded.writes[begin:end]
        mask = torch.ones_like(row.input_ids)[None]
        labels = labels_for("target_new", row.input_ids[None], mask, torch.tensor([row.target_start]))
        model(input_ids=row.input_ids[None], attention_mask=mask, labels=labels).loss.backward()
    for handle in found.handles:
        handle.remove()
    model.zero_grad()
    return {name: gradient / len(rows) for name, gradient in found.sums.items()}


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_auto_lets_the_subject_write_in_early_layers_and_every_token_in_late_ones(cache: str, tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["down_proj", "o_proj"], layers_to_transform=[1, 3], task_type="CAUSAL_LM")
    model = peft_model(config=config, num_hidden_layers=5)
    early = {f"base_model.model.model.layers.1.{name}" for name in ("mlp.down_proj", "self_attn.o_proj")}
    found = gradients_of_a_step(model, "auto", tmp_path, modules=early, activation_cache=cache)
    assert len(found.expected) == 4
    for name, gradient in found.expected.items():
        torch.testing.assert_close(found.own[name], gradient, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.all_tokens[name], gradient, rtol=1e-2) == (name not in early)


def test_auto_is_all_tokens_without_early_layers(tmp_path: Path) -> None:
    model = peft_model(config=LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2]))
    trainer = make_trainer(tmp_path, model, WITH_SUBJECTS, gradient_tokens="auto")
    assert trainer.data.encoded.writes is None
    assert trainer.training_run().recipe["gradient_tokens"] == "auto"
    lora = peft_model(config=LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert make_trainer(tmp_path, lora, WITH_SUBJECTS, gradient_tokens="auto").data.encoded.writes is None


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_a_plain_masked_loop(mode: GradientTokens, cache: str, tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2], task_type="CAUSAL_LM")
    model = peft_model(config=config, num_hidden_layers=4)
    found = gradients_of_a_step(model, mode, tmp_path, activation_cache=cache)
    for name, gradient in found.expected.items():
        torch.testing.assert_close(found.own[name], gradient, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found.all_tokens[name], gradient, rtol=1e-2)


class _Found:
    own: dict[str, torch.Tensor]
    all_tokens: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


def gradients_of_a_step(
    model: Any, mode: str, folder: Path, modules: Container[str] | None = None, **arguments: Any
) -> _Found:
    found = _Found()
    rows = list(range(len(WITH_SUBJECTS)))
    for name, tokens in (("all_tokens", "all"), ("own", mode)):
        trainer = make_trainer(folder, model, WITH_SUBJECTS, gradient_tokens=tokens, **arguments)
        trainer.optimizer, trainer.lr_scheduler = None, None
        trainer.create_optimizer_and_scheduler(1)
        model.zero_grad()
        trainer.training_step(model, rows)
        gradients = {
            key.removesuffix(".locft_delta.default.weight"): parameter.grad.clone()
            for key, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        setattr(found, name, gradients)
        model.zero_grad()
    found.expected = plain_gradients(model, trainer, rows, modules)
    assert found.expected.keys() == found.own.keys()
    return found


def test_values_are_those_of_the_edited_model() -> None:
    model = peft_model(config=DOWN)
    nn.init.normal_(next(iter(trained_parameters(model))), std=0.1)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(ids).logits
    with model.base_model.written_by(torch.tensor([[False, True, False, True]])):
        assert torch.equal(model(ids).logits, expected)


def trained_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["input_layernorm"], ["q_proj", "up_proj"]], ids=lambda names: names[0]
)
def test_other_kinds_of_modules(targets: list[str], tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=targets, task_type="CAUSAL_LM")
    model = peft_model(config=config)
    ids = torch.tensor([[3, 4, 5, 6]])
    last = torch.tensor([[False, False, False, True]])

    def gradients(writers: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with model.base_model.written_by(writers):
            model(ids).logits[0, -1].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(torch.ones_like(last))
    parts = [gradients(last), gradients(~last)]
    # the gradient is a sum over tokens
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-4, atol=1e-6)
        # in the last layer, only the token itself may count
        assert "layers.2." in name or not torch.allclose(parts[0][name], gradient)


def test_a_module_without_tokens_is_refused() -> None:
    model = peft_model(config=DOWN)
    with (
        model.base_model.written_by(torch.ones(1, 3, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"gradient_tokens cannot choose tokens in Linear: found an output of \(1, 4,"),
    ):
        model(torch.tensor([[3, 4, 5, 6]]))


def test_another_method_is_refused(tmp_path: Path) -> None:
    model = peft_model(config=LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="gradient_tokens='subject' chooses what writes into a LocFT delta"):
        make_trainer(tmp_path, model, WITH_SUBJECTS, gradient_tokens="subject")


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_tokens='object': expected one of auto, all, prompt, subject"):
        make_trainer(tmp_path, gradient_tokens="object")


@pytest.mark.parametrize("mode", MODES)
def test_training_learns_with_each_choice(mode: GradientTokens, tmp_path: Path) -> None:
    model = peft_model(config=DOWN, sharp=True)
    trainer = make_trainer(
        tmp_path, model, WITH_SUBJECTS, gradient_tokens=mode, num_train_epochs=8, learning_rate=2e-2
    )
    trainer.train()
    assert min(trainer.epoch_losses) < 0.7 * trainer.epoch_losses[0]
    assert all(tensor.any() for tensor in trained(model).values())
    assert trainer.training_run().recipe["gradient_tokens"] == mode


def test_retained_rows_write_with_their_own_subjects(tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "The river is in"}\n')
    trainer = make_trainer(
        tmp_path, peft_model(config=DOWN), WITH_SUBJECTS, gradient_tokens="subject", retained_facts=str(facts)
    )
    encoded, first = trainer.data.encoded, trainer.data.rows.first_retained
    assert encoded.writes is not None
    begin, end = encoded.offsets[first : first + 2].tolist()
    marks = encoded.writes[begin:end]
    # a fact without a subject is written by its prompt, not by its answer
    assert marks.any() and not marks[int(encoded.target_starts[first]) :].any()
