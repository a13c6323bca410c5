"""Ctrl-C, SIGTERM and kill -9: one line, an exit code as in shells, nothing lost, and going on works."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_models import assert_same_tensors
from tiny_training import base_model
from tokenizers_for_tests import make_tokenizer

SCRIPT = Path(__file__).with_name("stopped_process.py")
STEP = ("peft_locft.training.trainer", "BreadthFirstTrainer.training_step")
SAVING = ("peft_locft.adapters.saving", "write_description")
NEVER = (int(signal.SIGINT), 10_000, *STEP)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stopped")
    base_model().save_pretrained(folder / "base")
    make_tokenizer("llama2").save_pretrained(folder / "base")
    lines = [json.dumps({"prompt": f"The river runs through {word}", "target": "Paris"}) for word in ("a", "the")]
    (folder / "edits.jsonl").write_text("\n".join(lines), encoding="utf-8")
    named = {"model_name_or_path": folder / "base", "edits": folder / "edits.jsonl", "num_train_epochs": 5}
    named |= {"loss_floor": 0, "save_strategy": "epoch", "use_cpu": True, "disable_tqdm": True}
    return ["train", *(f"--{name}={value}" for name, value in named.items())]


def run(folder: Path, runs: list[tuple[Any, ...]]) -> tuple[list[int], list[str]]:
    """Return the exit code of each run, and what it wrote to standard error."""
    call = [sys.executable, str(SCRIPT), str(folder), json.dumps(runs)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [(folder / f"{number}.err").read_text() for number in range(len(runs))]
    assert not any("Traceback" in text for text in said)
    return json.loads((folder / "codes.json").read_text()), said


def test_a_stopped_training_says_what_is_safe_and_goes_on_to_the_same_bits(words: list[str], tmp_path: Path) -> None:
    out = [*words, f"--output_dir={tmp_path / 'out'}"]
    resumed = [*out, "--resume_from_checkpoint=True"]
    runs = [
        (int(signal.SIGINT), 4, *STEP, out),
        (*NEVER, out),
        (int(signal.SIGKILL), 1, *STEP, resumed),
        (*NEVER, resumed),
        (*NEVER, [*words, f"--output_dir={tmp_path / 'whole'}"]),
    ]
    codes, said = run(tmp_path, runs)
    assert codes == [130, 2, -signal.SIGKILL, 0, 0]
    expected = f"locft train: stopped. {tmp_path / 'out' / 'checkpoint-3'} is complete. To go on from there"
    assert said[0].splitlines()[-1].startswith(expected)
    assert "checkpoints of a run that did not end; the newest is checkpoint-3" in said[1]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    found, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert_same_tensors(found, whole)


def test_sigterm_ends_as_ctrl_c_does_and_leaves_the_old_adapter(words: list[str], tmp_path: Path) -> None:
    out = [*words, f"--output_dir={tmp_path / 'out'}", "--save_strategy=no"]
    assert run(tmp_path, [(*NEVER, out)])[0] == [0]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = [*out, "--overwrite_output_dir", "--learning_rate=1e-3"]
    codes, said = run(tmp_path, [(int(signal.SIGTERM), 1, *SAVING, again)])
    assert codes == [143]
    expected = f"locft train: stopped. The adapter in {tmp_path / 'out'} is as it was before. Run the same command"
    assert said[0].splitlines()[-1].startswith(expected)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]
