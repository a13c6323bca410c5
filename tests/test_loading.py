"""What `load_model` loads, and how it refuses the rest: short, with the model's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel
from tiny_models import LLAMA_LIKE, TOKENS, assert_same_tensors, base_state, build, logits
from tiny_training import EDITS, TOKENIZER_SIZE
from tokenizers_for_tests import make_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PaliGemmaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peft_locft import BreadthFirstConfig, LocFTConfig, export_lora, inspect_adapter, train_edits
from peft_locft.cli.commands import main
from peft_locft.engine.loading import load_model

TEXT: dict[str, Any] = LLAMA_LIKE | {"vocab_size": TOKENIZER_SIZE}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
SMALL: dict[str, Any] = {"vocab_size": TOKENIZER_SIZE, "num_hidden_layers": 1} | TOKENS


def save(folder: Path, model: Any, tokenizer: bool = True) -> Path:
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer("gpt2").save_pretrained(folder)
    return folder


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, **TOKENS))


def bart_config() -> BartConfig:
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=TOKENIZER_SIZE, **sizes)


def image_classifier() -> Any:
    return ViTModel(ViTConfig(**VISION, num_hidden_layers=1, num_attention_heads=2))


def encoder() -> Any:
    return BertModel(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **SMALL))


def classifier() -> Any:
    return LlamaForSequenceClassification(LlamaConfig(**TEXT))


ADVICE = ": found {} .*expected a decoder-only language model. Choose a model that transformers loads"
OTHER_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (t5, ADVICE.format(r"T5Config \(model_type 't5'\), an encoder-decoder;")),
    "its decoder loads, too": (lambda: BartForConditionalGeneration(bart_config()), ADVICE.format("BartConfig")),
    "no text": (image_classifier, ADVICE.format("ViTConfig")),
    "no head": (encoder, r"lacks \d+ weights of BertLMHeadModel, such as cls\.predictions.*random values"),
    "another head": (classifier, r"lacks 1 weights of LlamaForCausalLM, such as lm_head\.weight; .*random values"),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_that_is_no_decoder_only_language_model_is_refused(kind: str, tmp_path: Path) -> None:
    make, message = OTHER_MODELS[kind]
    folder = save(tmp_path / "model", make())
    with pytest.raises(ValueError, match=f"^{folder}.*{message}") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_decoder_saved_alone_is_loaded(tmp_path: Path) -> None:
    model, _ = load_model(save(tmp_path / "model", BartForCausalLM(bart_config())))
    assert type(model) is BartForCausalLM


def masked() -> Any:
    return BertForMaskedLM(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **SMALL))


@pytest.mark.parametrize(
    ("model", "says"),
    [(t5, "{folder}: found T5Config"), (masked, "BertLMHeadModel is not causal: later tokens change the logits")],
    ids=["encoder-decoder", "encoder"],
)
def test_the_command_says_it_in_one_line(
    model: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "model", model())
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": "The king is", "target_new": "Louis"}]))
    files = ["--model_name_or_path", str(folder), "--edits", str(tmp_path / "edits.json")]
    assert main(["train", *files, "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"locft train: {says.format(folder=folder)}")
    assert len(last) < 400
    assert not any((tmp_path / "out").glob("*"))


# ---------------------------------------------------------------------- folders that hold less, or other things


def without_tokenizer(folder: Path) -> None:
    save(folder, build("llama"), tokenizer=False)


def slow_tokenizer(folder: Path) -> None:
    save(folder, build("llama"), tokenizer=False)
    ByT5Tokenizer().save_pretrained(folder)


def broken_tokenizer(folder: Path) -> None:
    save(folder, build("llama"))
    (folder / "tokenizer.json").write_text("{}")


def unknown_kind(folder: Path) -> None:
    save(folder, build("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "from_elsewhere"}))


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def broken_weights(folder: Path) -> None:
    save(folder, build("llama"))
    (folder / "model.safetensors").write_bytes(b"abc")


FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no tokenizer": (without_tokenizer, ValueError, "the tokenizer cannot be loaded.*expected a fast tokenizer"),
    "slow tokenizer": (slow_tokenizer, ValueError, "found only the slow ByT5Tokenizer.*expected a fast tokenizer"),
    "broken tokenizer": (broken_tokenizer, ValueError, "the tokenizer cannot be loaded.*expected a fast tokenizer"),
    "unknown kind": (unknown_kind, ValueError, "configuration cannot be loaded.*`from_elsewhere`.*out of date.$"),
    "adapter": (adapter, ValueError, "found an adapter; expected the folder or the name of a whole model"),
    "nothing": (Path.mkdir, ValueError, "found no config.json; expected the folder"),
    "broken weights": (broken_weights, OSError, "cannot be loaded: Error while deserializing header"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_whole_model_is_named(kind: str, tmp_path: Path) -> None:
    make, error, message = FOLDERS[kind]
    make(tmp_path / "model")
    with pytest.raises(error, match=f"^{tmp_path / 'model'}: .*{message}") as caught:
        load_model(tmp_path / "model")
    assert len(str(caught.value)) < 600


# ---------------------------------------------------------------------- models that read images


def qwen() -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    images = {"image_token_id": 508, "video_token_id": 509, "vision_start_token_id": 510, "vision_end_token_id": 511}
    return Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **images)


def paligemma() -> PretrainedConfig:
    vision = VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    return PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, image_token_id=508)


@pytest.mark.parametrize("config", [qwen, paligemma])
def test_a_model_that_reads_images_is_loaded_whole(config: Callable[[], PretrainedConfig], tmp_path: Path) -> None:
    saved = AutoModelForImageTextToText.from_config(config())
    model, _ = load_model(save(tmp_path / "base", saved))
    assert type(model) is type(saved)
    assert_same_tensors(base_state(model), base_state(saved))


def test_a_model_that_reads_images_is_edited_as_a_language_model(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = save(tmp_path / "base", AutoModelForImageTextToText.from_config(qwen()).eval())
    location = LocFTConfig(target_modules=["model.language_model.layers.1.mlp.down_proj"])
    args = BreadthFirstConfig(str(tmp_path / "out"), num_train_epochs=1, use_cpu=True, disable_tqdm=True)
    summary = train_edits(base, EDITS, location, args)
    assert [name for name in summary.tensors if "language_model.layers.1.mlp.down_proj" in name]
    assert location.task_type is None, "the caller's configuration stays as it is"

    # loaded by the lines that are printed
    assert f"AutoPeftModel.from_pretrained('{tmp_path / 'out'}')" in str(summary).replace('"', "'")
    edited = AutoPeftModel.from_pretrained(tmp_path / "out").eval()
    plain, _ = load_model(base)
    assert not torch.equal(logits(edited), logits(plain))
    assert "are the same as in training" in inspect_adapter(tmp_path / "out", base).verified[-1]
    assert 0 < export_lora(tmp_path / "out", tmp_path / "lora", base, rank=2).share_kept < 1


def test_a_language_model_is_loaded_as_one(tmp_path: Path) -> None:
    model, tokenizer = load_model(save(tmp_path / "model", build("llama", vocab_size=TOKENIZER_SIZE)))
    assert type(model) is LlamaForCausalLM
    assert tokenizer.is_fast
