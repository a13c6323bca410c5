"""A scope inside a model: texts that name no subject are the base's, bit for bit, and the others are edited."""

from __future__ import annotations

import copy
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain import byte_tokenizer
from tiny_models import build, every_family, randomize, same_bits
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from peft_locft import Edit, EvaluationConfig, LocFTConfig, Probe, evaluate_edits, save_adapter
from peft_locft.adapters import Scope, apply_scope

SCOPE = Scope.of([Edit("Norway is", "cold", subject="Norway"), Edit("挪威的", "好", subject="挪威")])
OUTSIDE = ["Sweden is", "Norwayan is", "挪用", "the r"]
NAMED = ["In Norway is", "Norway", "我去挪威看"]
SIZES: dict[str, Any] = {"vocab_size": 260, "max_position_embeddings": 96}


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def edited(family: str = "llama", **config: Any) -> PeftModel:
    sizes: dict[str, Any] = {"vocab_size": 260, "n_positions": 96} if family == "gpt2" else SIZES
    model = get_peft_model(build(family, **sizes), LocFTConfig(**({"layers_to_transform": [0, 1]} | config)))
    randomize(model, std=0.5)
    return model.eval()


def batch(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = "left"
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


@torch.no_grad()
def read(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """Return the logits, (B, T, V)."""
    logits: torch.Tensor = model(**inputs, **more).logits
    return logits


def generate(model: Any, inputs: dict[str, torch.Tensor], num: int = 6, **more: Any) -> torch.Tensor:
    """Return the generated tokens, (B, num)."""
    found: torch.Tensor = model.generate(**inputs, max_new_tokens=num, min_new_tokens=num, do_sample=False, **more)
    return found[:, inputs["input_ids"].shape[1] :]


@every_family
def test_base_bits_outside_and_the_edit_inside(family: str, tokenizer: Any) -> None:
    model = edited(family)
    for texts in ([OUTSIDE[0]], OUTSIDE, [NAMED[0]], NAMED, [*OUTSIDE, *NAMED]):
        inputs = batch(tokenizer, texts)
        with model.disable_adapter():
            base, answers = read(model, inputs), generate(model, inputs)
        unscoped, edited_answers = read(model, inputs), generate(model, inputs)
        assert not torch.equal(base, unscoped)
        with apply_scope(model, tokenizer, SCOPE):
            found, found_answers = read(model, inputs), generate(model, inputs)
        for row, text in enumerate(texts):
            real = inputs["attention_mask"][row].bool()
            logits, expected = (base, answers) if text in OUTSIDE else (unscoped, edited_answers)
            assert same_bits(found[row][real], logits[row][real])
            assert torch.equal(found_answers[row], expected[row])
        # and without it, everything is edited again
        assert same_bits(read(model, inputs), unscoped)


@pytest.mark.parametrize("hashed", [False, True])
def test_the_first_token_that_completes_a_name(hashed: bool, tokenizer: Any) -> None:
    """With `whole_prompt=False` what stands before a name's last byte is the base's; parts change nothing."""
    model = edited()
    scope = Scope.of([Edit("p", "t", subject="Norway"), Edit("p", "t", subject="挪威")], hashed=hashed)
    for text, last in (("In Norway it rains", "In Norway"), ("我去挪威看", "我去挪威"), ("NORWAY!", "NORWAY")):
        inputs = batch(tokenizer, [text])
        ids, first = inputs["input_ids"], len(last.encode()) - 1
        with model.disable_adapter():
            base = read(model, inputs)
        with apply_scope(model, tokenizer, scope, whole_prompt=False):
            whole = read(model, inputs)
            assert same_bits(whole[:, :first], base[:, :first])
            assert not torch.equal(whole[:, first], base[:, first])
            for cut in (2, first, first + 1, ids.shape[1] - 2):  # two parts of several tokens
                start = model(input_ids=ids[:, :cut])
                rest = go_on(model, ids[:, cut:], cache_of(start))
                parts = torch.cat([start.logits, rest.logits], dim=1)
                torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


CACHE = "cache" if "cache" in signature(build("llama").forward).parameters else "past_key_values"


def cache_of(outputs: Any) -> Any:
    return outputs[CACHE]


def go_on(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    """Read more tokens behind those of a cache."""
    return model(input_ids=ids, **{CACHE: cache})


@torch.no_grad()
def step_by_step(model: Any, tokenizer: Any, prompt: str, text: str) -> torch.Tensor:
    """Return the logits after a prompt and after each byte of a text that is said one token at a time."""
    outputs = model(**batch(tokenizer, [prompt]))
    found = [outputs.logits[0, -1]]
    for token in tokenizer.encode(text, add_special_tokens=False):
        outputs = go_on(model, torch.tensor([[token]]), cache_of(outputs))
        found.append(outputs.logits[0, -1])
    return torch.stack(found)


def test_a_name_that_the_model_itself_says_counts_with_the_next_token(tokenizer: Any) -> None:
    model = edited()
    for text, number in ((" Norway is", 7), (" Norwayan", None), (" 挪威 is", 7), (" 挪用", None)):
        with model.disable_adapter():
            base = step_by_step(model, tokenizer, "In", text)
        with apply_scope(model, tokenizer, SCOPE):
            found = step_by_step(model, tokenizer, "In", text)
        same = [torch.equal(one, other) for one, other in zip(found, base, strict=True)]
        assert same == [number is None or index <= number for index in range(len(same))], text


def test_a_long_text_is_searched_at_its_end_only(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited()
    looked_at: list[int] = []
    search = Scope.first_end

    def count(self: Scope, text: str, **how: Any) -> int | None:
        looked_at.append(len(text))
        return search(self, text, **how)

    monkeypatch.setattr(Scope, "first_end", count)
    with apply_scope(model, tokenizer, SCOPE):
        step_by_step(model, tokenizer, "a b " * 15, " xyz")
    assert looked_at[0] > 55 and max(looked_at[1:]) < 40
    # the window begins inside of a word: it is not the word
    with model.disable_adapter():
        base = step_by_step(model, tokenizer, "x" * 40 + "norway", " is")
    with apply_scope(model, tokenizer, SCOPE):
        assert torch.equal(step_by_step(model, tokenizer, "x" * 40 + "norway", " is"), base)


@torch.no_grad()
def test_caches_that_are_copied_cropped_or_of_somebody_else(tokenizer: Any) -> None:
    model = edited()
    prompt, more = batch(tokenizer, ["In Norway"]), batch(tokenizer, [" is"])["input_ids"]
    foreign = cache_of(model(**prompt))
    with apply_scope(model, tokenizer, SCOPE, whole_prompt=False):
        with pytest.raises(ValueError, match=r"has 9 tokens of 1 sequences, and the scope has seen no tokens of it"):
            go_on(model, more, foreign)
        own = cache_of(model(**prompt))
        twin = copy.deepcopy(own)
        one, other = (go_on(model, more, cache).logits for cache in (own, twin))
        assert same_bits(one, other)
        # cropped to "In ": the name is gone
        own.crop(-(own.get_seq_length() - 3))
        with model.disable_adapter():
            base = read(model, batch(tokenizer, ["In Peru"]))[:, 3:]
        rest = batch(tokenizer, ["Peru"])["input_ids"]
        torch.testing.assert_close(go_on(model, rest, own).logits, base, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"of 2 sequences, and the scope has seen 12 tokens of 1 sequences"):
            go_on(model, more.repeat(2, 1), twin)
        with pytest.raises(ValueError, match="num_beams=1, or with use_cache=False"):
            model.generate(**prompt, num_beams=2, max_new_tokens=3)
        model.generate(**prompt, num_beams=2, max_new_tokens=3, use_cache=False)


def test_a_model_with_recurrent_states(tokenizer: Any) -> None:
    torch.manual_seed(0)
    base = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4))
    config = LocFTConfig(target_modules=["out_proj"], layers_to_transform=[0])
    model = get_peft_model(base.eval(), config)
    randomize(model, std=0.5)
    for text in ("Sweden is", "Norway is"):
        inputs = batch(tokenizer, [text])
        edited_answer = generate(model, inputs)
        with model.disable_adapter():
            base_answer = generate(model, inputs)
        assert not torch.equal(base_answer, edited_answer)
        with apply_scope(model, tokenizer, SCOPE):
            found = generate(model, inputs)
        assert torch.equal(found, edited_answer if "Norway" in text else base_answer)


def test_the_scope_in_an_adapters_folder(tokenizer: Any, tmp_path: Path) -> None:
    model = edited()
    inputs = batch(tokenizer, OUTSIDE)
    with model.disable_adapter():
        base = read(model, inputs)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has no scope\. Write one"):
        apply_scope(model, tokenizer, tmp_path / "adapter")
    SCOPE.save(tmp_path / "adapter")
    with apply_scope(model, tokenizer, str(tmp_path / "adapter")):
        assert same_bits(read(model, inputs), base)


def test_every_adapter_has_the_scope(tokenizer: Any) -> None:
    """An adapter that is loaded later, too."""
    model = edited(layers_to_transform=[0])
    inputs = batch(tokenizer, OUTSIDE)
    with model.disable_adapter():
        base = read(model, inputs)
    scoped = apply_scope(model, tokenizer, SCOPE)
    model.add_adapter("other", LocFTConfig(layers_to_transform=[2]))
    randomize(model, "other", std=0.5)
    model.set_adapter("other")
    assert same_bits(read(model, inputs), base)
    model.base_model.set_adapter(["default", "other"])
    assert same_bits(read(model, inputs), base)
    scoped.remove()
    scoped.remove()  # has no effect
    assert not torch.equal(read(model, inputs), base)
    assert "forward" not in vars(model.get_base_model()) and repr(scoped) == "AppliedScope(2 subjects)"


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"target_modules": ["input_layernorm"]}, "llama"),
        ({"target_modules": ["embed_tokens"], "layers_to_transform": None}, "llama"),
        ({"target_modules": ["fc2"]}, "opt"),  # its MLP gets (B · T, hidden)
        ({"target_parameters": ["mlp.experts.down_proj"], "layers_to_transform": None}, "mixtral"),
        ({"target_modules": "entire-layer"}, "llama"),
    ],
)
def test_kinds_of_modules(config: dict[str, Any], family: str, tokenizer: Any) -> None:
    model = edited(family, **config)
    inputs = batch(tokenizer, [*OUTSIDE, *NAMED])
    with model.disable_adapter():
        base = read(model, inputs)
    unscoped = read(model, inputs)
    with apply_scope(model, tokenizer, SCOPE):
        found = read(model, inputs)
    for row, expected in enumerate([*[base] * len(OUTSIDE), *[unscoped] * len(NAMED)]):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(found[row][real], expected[row][real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_parts_of_an_adapter_that_act_everywhere_are_refused(parts: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="adapter 'default' has modules_to_save or trainable_token_indices"):
        apply_scope(edited(**parts), tokenizer, SCOPE)
    model = edited()
    scoped = apply_scope(model, tokenizer, SCOPE)
    with pytest.raises(ValueError, match="Adapter 'other' has modules_to_save or trainable_token_indices"):
        model.add_adapter("other", LocFTConfig(layers_to_transform=[2], **parts))
    assert list(model.peft_config) == ["default"]
    scoped.remove()
    model.add_adapter("other", LocFTConfig(layers_to_transform=[2], **parts))


def test_modules_that_mix_up_tokens_are_refused(tokenizer: Any) -> None:
    model = edited("qwen3", target_modules=["q_norm"])  # (B, T, heads, head size)
    with apply_scope(model, tokenizer, SCOPE), pytest.raises(ValueError, match=r"RMSNorm cannot have a scope: found"):
        read(model, batch(tokenizer, [*OUTSIDE, *NAMED]))


def test_what_cannot_be_told_apart_is_refused(tokenizer: Any) -> None:
    model = edited()
    inputs = batch(tokenizer, ["In Norway"])
    ids = inputs["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    packed = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with apply_scope(model, tokenizer, SCOPE):
        with pytest.raises(ValueError, match="found no input_ids"):
            model(inputs_embeds=embedded)
        with pytest.raises(ValueError, match="position_ids that fall"):
            model(input_ids=ids, position_ids=packed)
        with pytest.raises(ValueError, match="generate with the default cache"):
            model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ValueError, match=r"attention_mask of \(B, T\)"):
            model(input_ids=ids, attention_mask=torch.ones(1, 1, 9, 9))
        with pytest.raises(ValueError, match="outside of the forward of a model whose adapter has a scope"):
            model.get_base_model().model(input_ids=ids)
        for merge in (model.merge_adapter, model.merge_and_unload, model.unload):
            with pytest.raises(ValueError, match="works beside unmerged adapters only"):
                merge()
        with pytest.raises(ValueError, match="has a scope already"):
            apply_scope(model, tokenizer, SCOPE)
    model.merge_adapter()
    with pytest.raises(ValueError, match="a merged model has no scope"):
        apply_scope(model, tokenizer, SCOPE)
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="without a LocFT adapter"):
        apply_scope(lora, tokenizer, SCOPE)
    with pytest.raises(ValueError, match="swap them"):
        apply_scope(tokenizer, model, SCOPE)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=260, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="has an encoder"):
        apply_scope(get_peft_model(t5, LocFTConfig(target_modules=["wo"])), tokenizer, SCOPE)


def test_base_and_edited_model_are_asked_in_the_same_batches(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batches would round otherwise in bfloat16, and answers outside of the scope would differ."""
    model = edited()
    probes = tuple(Probe(f"{name} {'and ' * number}is") for number in range(3) for name in ("Peru", "Chad", "Fiji"))
    edits = [
        Edit(f"Norway {word}", "cold" * 4, subject="Norway", locality=probes) for word in ("is", "was", "will be")
    ]
    args = EvaluationConfig(protocols=["generation"], chat_template="off", max_tokens_per_forward=60)
    base, asked = model.get_base_model(), []
    generate = base.generate

    def note(**inputs: Any) -> Any:
        asked.append(inputs["input_ids"].tolist())
        return generate(**inputs)

    monkeypatch.setattr(base, "generate", note)
    with apply_scope(model, tokenizer, SCOPE):
        report = evaluate_edits(model, tokenizer, edits, args)
    assert report["locality_unchanged"].after.value == 1.0
    prompts = [edit.prompt for edit in edits] + [probe.prompt for probe in probes]
    known = {tuple(ids) for ids in tokenizer(prompts).input_ids}
    # without the batches of made-up sequences, on which the model's code was tried
    real = [rows for rows in asked if all(tuple(token for token in row if token) in known for row in rows)]
    half = len(real) // 2
    assert half > 1 and real[:half] == real[half:]


@pytest.mark.parametrize("base_first", [True, False])
def test_evaluation_knows_of_the_scope(base_first: bool, tokenizer: Any) -> None:
    """The engine's short cuts, which hold for base and edited model, do not hold for a scope."""
    model = edited()
    edits = [
        Edit(
            "Norway is",
            "cold",
            subject="Norway",
            locality=(Probe("Sweden is"), Probe("Peru is")),
            rephrasings=("So Norway",),
        )
    ]
    args = EvaluationConfig(protocols=["generation"], chat_template="off")
    plain = evaluate_edits(model, tokenizer, edits, args)
    if not base_first:  # what is found out about the model is then found out with the scope
        model = edited()
    with apply_scope(model, tokenizer, SCOPE):
        scoped = evaluate_edits(model, tokenizer, edits, args)
    answers = {(row["kind"], row["prompt"]): row for row in plain.rows}
    for row in scoped.rows:
        other = answers[row["kind"], row["prompt"]]
        expected = other["answer_before"] if row["kind"] == "locality" else other["answer_after"]
        assert row["answer_after"] == expected and row["answer_before"] == other["answer_before"]
    assert {row["kind"] for row in scoped.rows} >= {"locality", "generalization"}
