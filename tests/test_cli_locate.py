"""`locft locate` on the command line, and `locft train --location`, which takes what it has found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_searches import preset_for
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import LocationPreset, inspect_adapter
from peft_locft.cli.arguments import parse_locate, parse_train
from peft_locft.cli.commands import main

TINY_RUN = ["--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "True"]


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    """What both commands need."""
    base_model().save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    records = [{"prompt": edit.prompt, "target_new": edit.target} for edit in EDITS]
    (tmp_path / "edits.json").write_text(json.dumps(records))
    return ["--model_name_or_path", str(tmp_path / "base"), "--edits", str(tmp_path / "edits.json"), *TINY_RUN]


def test_what_is_found_is_trained(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, best = ["--output_dir", str(tmp_path / "search")], tmp_path / "search" / "best.json"
    plan = ["--modules", "up", "--layers", "2", "--learning_rates", "up=3e-3"]
    assert main(["locate", *call, *out, *plan]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "search" / "locations.md").read_text())
    assert f"Saved to {tmp_path / 'search'}: train with --location best.json in it." in printed
    assert main(["train", *call, "--output_dir", str(tmp_path / "out"), "--location", str(best)]) == 0
    summary = inspect_adapter(tmp_path / "out")
    assert set(summary.config.target_modules) == {"model.layers.2.mlp.up_proj"}
    assert summary.provenance.to_dict()["recipe"]["learning_rate"] == 3e-3


def test_a_rate_that_is_given_goes_before_that_of_the_location(tmp_path: Path) -> None:
    preset_for(base_model()).save(tmp_path / "best.json")
    words = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", str(tmp_path), "--location"]
    found = parse_train([*words, str(tmp_path / "best.json")])
    assert isinstance(found["peft_config"], LocationPreset) and found["args"].learning_rate == 2e-3
    assert parse_train([*words, str(tmp_path / "best.json"), "--learning_rate", "1e-4"])["args"].learning_rate == 1e-4
    (tmp_path / "run.yaml").write_text(f"location: {tmp_path / 'best.json'}\nlearning_rate: 1.0e-5\n")
    assert parse_train([*words[:-1], "--config", str(tmp_path / "run.yaml")])["args"].learning_rate == 1e-5


def test_tokens_that_are_given_go_before_those_of_the_location(tmp_path: Path) -> None:
    preset_for(base_model(), gradient_tokens="subject").save(tmp_path / "best.json")
    words = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", str(tmp_path)]
    words += ["--location", str(tmp_path / "best.json")]
    assert parse_train(words)["args"].gradient_tokens == "subject"
    assert parse_train([*words, "--gradient_tokens", "prompt"])["args"].gradient_tokens == "prompt"
    # a location without tokens leaves them to the recipe
    preset_for(base_model()).save(tmp_path / "best.json")
    assert parse_train(words)["args"].gradient_tokens == "all"


def test_a_band_that_is_found_is_trained_with_its_tokens(call: list[str], tmp_path: Path) -> None:
    out, best = ["--output_dir", str(tmp_path / "search")], tmp_path / "search" / "best.json"
    plan = ["--modules", "up", "--layers", "1", "--widths", "2", "--try_gradient_tokens", "from_subject"]
    assert main(["locate", *call, *out, *plan]) == 0
    assert main(["train", *call, "--output_dir", str(tmp_path / "out"), "--location", str(best)]) == 0
    summary = inspect_adapter(tmp_path / "out")
    assert set(summary.config.target_modules) == {f"model.layers.{layer}.mlp.up_proj" for layer in (1, 2)}
    assert summary.provenance.to_dict()["recipe"]["gradient_tokens"] == "from_subject"


def test_flags_become_arguments() -> None:
    words = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o", "--layers", "1", "3", "--stride", "2"]
    asked = [
        "--score",
        "perplexity=2",
        "locality_unchanged",
        "--learning_rates",
        "mlp=1e-3",
        "--max_text_tokens",
        "99",
    ]
    found = parse_locate([*words, *asked, "--text_window", "33", "--seed", "5"])
    assert found["score"] == {"perplexity": 2.0, "locality_unchanged": 1.0}
    plan, evaluation = found["plan"], found["evaluation"]
    assert (plan.layers, plan.stride, plan.keep, plan.num_rungs, plan.learning_rates) == (
        [1, 3],
        2,
        5,
        None,
        {"mlp": 1e-3},
    )
    assert (evaluation.max_text_tokens, evaluation.text_window, found["args"].seed) == (99, 33, 5)
    plan = parse_locate(words)["plan"]
    assert (parse_locate(words)["score"], plan.widths, plan.gradient_tokens) == (None, [1], None)
    axes = ["--widths", "1", "3", "--try_gradient_tokens", "all", "subject", "--gradient_tokens", "prompt"]
    found = parse_locate([*words, *axes])
    plan, tokens_of_recipe = found["plan"], found["args"].gradient_tokens
    assert (plan.widths, plan.gradient_tokens, tokens_of_recipe) == ([1, 3], ["all", "subject"], "prompt")


def refused(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([command, *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "perplexity=much"], "--score: found 'perplexity=much'; expected NAME=NUMBER."),
        (["--learning_rates", "mlp"], "--learning_rates: found 'mlp'; expected NAME=NUMBER."),
        (["--score", "locality"], "score: found locality; expected one or more of"),
        (["--modules", "middle"], "has no module of that kind or name"),
        (["--widths", "0"], "widths: found [0]; expected numbers of neighbouring layers"),
        (["--widths", "4"], "widths: found 4, but the model has 3 decoder layers"),
        (["--try_gradient_tokens", "object"], "gradient_tokens: found ['object']; expected a list of some of auto"),
    ],
)
def test_mistakes_in_a_search(
    words: list[str], message: str, call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("locate", [*call, "--output_dir", str(tmp_path / "out"), *words], capsys)


def test_two_locations_are_refused(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset_for(base_model()).save(tmp_path / "best.json")
    words = [*call, "--output_dir", str(tmp_path / "out"), "--location", str(tmp_path / "best.json")]
    others: list[tuple[list[str], Any]] = [
        (["--layers_to_transform", "1"], "found --location beside --layers_to_transform, and each says what to train"),
        (
            ["--target_modules", "down_proj", "--scale", "2"],
            "found --location beside --target_modules, --scale, and",
        ),
        (
            ["--peft_config", "lora"],
            "beside --peft_config, and each says what to train: give one of them.",
        ),
    ]
    for flags, message in others:
        assert message in refused("train", [*words, *flags], capsys)


def test_a_location_for_another_model_is_refused(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset_for(base_model("qwen2")).save(tmp_path / "best.json")
    words = [*call, "--output_dir", str(tmp_path / "out"), "--location", str(tmp_path / "best.json")]
    assert "expected a qwen2 model with 3 layers of width 32; found a llama model" in refused("train", words, capsys)
    assert not (tmp_path / "out").exists()
    words[-1] = str(tmp_path / "nowhere.json")
    assert "nowhere.json: cannot read a location" in refused("train", words, capsys)
