"""`locft merge` and `locft detach` do what the functions do, and say so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import SHARDS, edit, hub_cache, save_base, snapshot, stored
from tiny_models import assert_same_tensors

from peft_locft import merge_checkpoint
from peft_locft.cli.commands import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_base(tmp_path / "model", shard_size=SHARDS)


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> list[str]:
    for seed, name in enumerate(("a", "b")):
        edit(model, tmp_path / name, seed=seed)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_merge_writes_a_new_folder(
    model: Path, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--weights", "0.5", "-1", "--scale", "2", "--link", "copy"]
    assert main(["merge", str(model), *adapters, str(out), *options]) == 0
    expected = merge_checkpoint(model, adapters, tmp_path / "expected", weights=[0.5, -1], scale=2, link="copy")
    assert_same_tensors(stored(out), stored(tmp_path / "expected"))
    printed = capsys.readouterr().out
    assert printed.splitlines()[:-1] == str(expected).replace("expected", "out").splitlines()[:-1]
    assert re.fullmatch(r"time        \d+\.\d s", printed.splitlines()[-1])


LIGHT = """
import sys
from peft_locft.cli import main
base, adapter, out = sys.argv[1:]
for words in ("inspect A --base B", "merge B A OUT", "merge --in-place B A", "detach B"):
    places = {"B": base, "A": adapter, "OUT": out}
    assert main([places.get(word, word) for word in words.split()]) == 0
print([name for name in ("transformers", "peft", "datasets", "accelerate") if name in sys.modules])
"""


def test_a_merge_and_an_inspection_do_not_load_transformers_and_peft(
    model: Path, adapters: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LIGHT, str(model), adapters[0], str(tmp_path / "light")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("flag", ["--in-place", "--in_place"])
def test_merge_in_place_and_detach(
    flag: str, model: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(model)
    assert main(["merge", flag, str(model), *adapters]) == 0
    merged = capsys.readouterr().out
    assert snapshot(model) != before
    assert main(["detach", str(model)]) == 0
    detached = capsys.readouterr().out
    assert snapshot(model) == before
    assert f"model       {model}\nchanged     model.layers.1.mlp.down_proj.weight (1 in total)\n" in merged
    assert merged.splitlines()[:-1] == detached.splitlines()[:-1]


def test_a_base_on_the_hub(model: Path, adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_cache(tmp_path / "cache", "somebody/model", model)
    call = ["merge", "somebody/model", *adapters, str(tmp_path / "out"), "--revision", "main"]
    assert main(call) == 0
    assert main(["merge", "--in-place", "somebody/model", *adapters]) == 2


def test_mistakes_end_with_2_and_one_message(
    model: Path, adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(save_base(tmp_path / "other", seed=1))
    calls = {
        "locft detach: .*nothing is merged in place there": ["detach", other],
        "locft merge: .* is not the weight that": ["merge", other, *adapters, str(tmp_path / "out")],
        "locft merge: .*weights: found 1 for 2 adapters": [
            "merge", other, *adapters, str(tmp_path / "out"), "--weights", "1",
        ],
    }  # fmt: skip
    for message, call in calls.items():
        assert main(call) == 2
        assert re.search(f"^{message}", capsys.readouterr().err, re.MULTILINE)
    assert main(["merge", other, *adapters, str(tmp_path / "out"), "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "out"], "expected BASE, one or more adapters, and OUT; to change the base itself: --in_place"),
        (["--in-place", "model"], r"--in_place takes MODEL ADAPTER\.\.\.$"),
        (["--in-place", "model", "a", "--link", "copy"], r"--in_place takes MODEL ADAPTER\.\.\., and no --link"),
        (["--in-place", "model", "a", "--revision", "main"], "and no --revision"),
    ],
)
def test_calls_of_the_wrong_form(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["merge", *words])
    assert re.search(message, capsys.readouterr().err, re.MULTILINE)
