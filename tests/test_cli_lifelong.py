"""`locft train --resume_from_adapter` and `locft inspect --edits`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft.adapters import shipped_edits
from peft_locft.cli.arguments import parse_train
from peft_locft.cli.commands import main
from peft_locft.data import edit_id
from peft_locft.data.edit_types import edit_lines

RUN = ["--num_train_epochs", "1", "--use_cpu", "--disable_tqdm", "True"]
RESUMED = ["--resume_from_adapter", "a", "--output_dir", "o", "--use_cpu"]


def test_an_adapter_is_listed_and_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out, edits = tmp_path / "model", tmp_path / "out", tmp_path / "edits.jsonl"
    base_model().save_pretrained(base)
    make_tokenizer("llama2").save_pretrained(base)
    edits.write_text(edit_lines(EDITS))
    call = ["train", "--model_name_or_path", str(base), "--edits", str(edits), "--num_edits", "7", "--ship_edits"]
    assert main([*call, "--output_dir", str(out), *RUN]) == 0
    assert shipped_edits(out) == EDITS[:7]
    capsys.readouterr()
    assert main(["inspect", str(out), "--edits"]) == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[0] == f"{edit_id(EDITS[0])}  'The capital of France is' -> 'Madrid'"
    assert main(["inspect", str(out), "--edits", str(edits)]) == 0
    assert capsys.readouterr().out == listed

    (tmp_path / "ids.txt").write_text("\n".join(line for line in listed.splitlines() if "Spain" in line))
    edits.write_text(edit_lines(EDITS[7:]))
    update = ["train", "--resume_from_adapter", str(out), "--forget", str(tmp_path / "ids.txt")]
    before = (out / "adapter_model.safetensors").read_bytes()
    assert main([*update, "--edits", str(edits), "--output_dir", str(out), *RUN]) == 1  # too short to withdraw an edit
    assert (
        f"\nA change failed, so {out} is as it was. The new adapter is in {out}.update-1." in capsys.readouterr().out
    )
    assert (out / "adapter_model.safetensors").read_bytes() == before and shipped_edits(out) == EDITS[:7]
    monkeypatch.setattr("peft_locft.workflows.update._has_failed", lambda outcomes: False)
    assert main([*update, "--edits", str(edits), "--output_dir", str(out), *RUN]) == 0
    assert "\nedits: 5 kept, 1 added, 0 replaced, 2 withdrawn\n" in capsys.readouterr().out
    assert shipped_edits(out) == [EDITS[0], *EDITS[3:]]


def test_the_flags_are_those_of_the_function(tmp_path: Path) -> None:
    found = parse_train([*RESUMED, "--forget", "f", "--trained_edits", "k", "--seed", "3"])
    args = found.pop("args")
    assert (args.output_dir, args.seed) == ("o", 3)
    assert found == {
        "adapter": "a",
        "edits": None,
        "forget": "f",
        "trained_edits": "k",
        "fail_if": [],
        "ship_edits": None,
        "model_name_or_path": None,
        "revision": None,
        "dtype": "auto",
        "trust_remote_code": False,
        "on_conflict": "warn",
        "num_edits": None,
    }
    dashed = parse_train(["--resume-from-adapter=a", "--output-dir", "o", "--use-cpu", "--forget", "f"])
    assert (dashed["adapter"], dashed["model_name_or_path"], dashed["edits"]) == ("a", None, None)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"resume-from-adapter": "b", "ship_edits": True}))
    found = parse_train(["--config", str(tmp_path / "run.yaml"), "--output_dir", "o", "--use_cpu", "--edits", "e"])
    assert (found["adapter"], found["edits"], found["ship_edits"]) == ("b", "e", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RESUMED, "--layers_to_transform", "1"], "takes no --layers_to_transform: leave it out"),
        ([*RESUMED, "--target_modules", "up_proj", "--forget", "f"], "takes no --target_modules"),
        ([*RESUMED, "--peft_config", "lora"], "takes no --peft_config"),
        ([*RESUMED, "--evaluate_every", "2"], "takes no --evaluate_every"),
        ([*RESUMED], "found neither edits nor forget"),
        ([*RESUMED, "--forget", "f"], "a is not an adapter folder"),
        (
            ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o", "--use_cpu", "--forget", "f"],
            "--forget is for updating an adapter: also give --resume_from_adapter",
        ),
        (
            ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o", "--use_cpu", "--trained_edits", "f"],
            "--trained_edits is for updating an adapter",
        ),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
