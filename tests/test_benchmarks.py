"""The benchmarks run, and their plain loop and their arithmetic are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import adapter_sizes
from benchmarks.answers import looped
from benchmarks.speed import count_tokens, plain_loss, tail_flops
from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig, MistralConfig

from peft_locft import Edit, EvaluationConfig, encode_edits, evaluate_edits

REPOSITORY = Path(__file__).parents[1]


def test_the_plain_loop_has_our_losses(tmp_path: Path) -> None:
    model = peft_model()
    trainer = make_trainer(tmp_path, model, per_device_train_batch_size=8, learning_rate=0.0)
    trainer.train()
    encoded = encode_edits(EDITS, make_tokenizer("llama2"))
    plain = plain_loss(model, [encoded[index] for index in range(len(EDITS))], pad_token_id=0)
    assert plain.item() == pytest.approx(trainer.epoch_losses[0], rel=1e-5)


def test_tokens_are_counted_once_and_without_the_last() -> None:
    tokenizer = make_tokenizer("llama2")
    edits = [Edit(prompt="The capital of France is", target=target) for target in ("Paris", "Madrid")]
    encoded = encode_edits(edits, tokenizer)
    prompt = int(encoded.target_starts[0])
    targets = [int(length) - prompt for length in encoded.lengths]
    assert count_tokens(encoded, batch_size=2) == (prompt + sum(targets) - 2, sum(targets))
    assert count_tokens(encoded, batch_size=1) == (2 * prompt + sum(targets) - 2, sum(targets))


def test_the_floor_counts_what_must_be_computed() -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=100,
    )  # fmt: skip
    # matrices of a layer: q and o 8 x 8, k and v 8 x 4, three of the MLP 8 x 16
    down, mlp, query_and_output, key_and_value, head = 8 * 16, 3 * 8 * 16, 2 * 8 * 8, 2 * 8 * 4, 8 * 100
    between = query_and_output + key_and_value + mlp
    last = 10 * key_and_value + 3 * (query_and_output + mlp)
    # forward and backward, two operations a weight
    assert tail_flops(10, 3, 1, config) == 4 * (10 * down + 10 * between + last + 3 * head)
    assert tail_flops(10, 3, 3, config) == 4 * (3 * down + 3 * head)


def test_the_padded_loop_answers_as_evaluations_do() -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    report = evaluate_edits(model, tokenizer, EDITS, EvaluationConfig(protocols=["generation"]))
    answers = looped(model, tokenizer, [edit.prompt for edit in EDITS], 3, {})
    assert answers == [row["answer_after"] for row in report.rows]


def test_the_sizes_of_adapters_are_those_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = LlamaConfig(intermediate_size=1000, vocab_size=100, **sizes)
    entire = MistralConfig(intermediate_size=1000, vocab_size=100, **sizes)
    monkeypatch.setattr(adapter_sizes, "MODELS", {"small": small, "entire": entire})
    first, second = adapter_sizes.rows()
    assert first[0:2] == ["small", "model.layers.1.mlp.down_proj.weight"]
    # 64 x 1000 values of four and two bytes; 16 and 64 of 64 + 1000
    assert first[3:] == ["0.3 MB", "0.1 MB", "68.1 kB", "0.3 MB"]
    assert second[1] == "entire layer, 9 tensors" and second[5:] == ["-", "-"]


@pytest.mark.slow
def test_the_benchmark_of_lora_exports_runs(tmp_path: Path) -> None:
    few = ["--num_edits", "4", "--epochs", "1", "--ranks", "2", "--threads", "1", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "tests.benchmarks.lora_export", *few]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "lora_export.json").read_text())["table"]
    assert [row["form"] for row in rows][:2] == ["as trained", "bfloat16"] and rows[-1]["form"] == "LoRA, rank 2"
    assert float(rows[0]["share kept"]) == 1 > float(rows[-1]["share kept"]) > 0


@pytest.mark.slow
def test_the_benchmark_of_chat_models_runs(tmp_path: Path) -> None:
    few = ["--edits", "examples/facts.jsonl", "--num_edits", "1", "--threads", "1", "--thinking"]
    command = [sys.executable, "-m", "tests.benchmarks.chat", *few, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "chat.json").read_text())["rows"]
    assert [row["trained"] for row in rows] == ["off", "on", "both"]
    assert all(0 <= row[way] <= 1 for row in rows for way in ("raw", "chat", "system prompt", "chat, no block"))
    assert [row["raw"] for row in rows] == [1, 0, 1]


@pytest.mark.slow
def test_the_benchmark_of_first_contact_runs(tmp_path: Path) -> None:
    few = ["--edits", "examples/facts.jsonl", "--num_edits", "1", "--recipes", "published", "--threads", "1"]
    command = [sys.executable, "-m", "tests.benchmarks.first_contact", *few, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "first_contact.json").read_text())["rows"]
    assert row["learned"] == row["edits"] == 1


@pytest.mark.slow
def test_the_scale_benchmark_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--counts", "150", "300", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--threads", "1"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scale.json").read_text())["table"]
    assert [row["edits"] for row in rows] == [150, 300]
    assert all(row["ms/edit"] > 0 for row in rows)
    assert (tmp_path / "scale.png").stat().st_size > 1000
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_merge_benchmark_runs(tmp_path: Path) -> None:
    sizes = ["--layers", "2", "--hidden_size", "64", "--intermediate_size", "128", "--vocab_size", "500"]
    places = ["--folder", str(tmp_path / "made"), "--output", str(tmp_path / "results"), "--repeats", "1"]
    command = [sys.executable, "-m", "tests.benchmarks.merge", *sizes, *places]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "merge.json").read_text())
    assert results["same"]
    assert results["checkpoint"]["files"] > 1
    assert all(row["seconds"] > 0 for row in results["table"])
    assert not (tmp_path / "made").exists()
