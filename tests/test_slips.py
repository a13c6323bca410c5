"""Slips of the command line: each ends with 2 and one line that says what was meant."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache

import pytest

from peft_locft.cli.commands import COMMANDS, main
from peft_locft.cli.slips import FLAGS_OF, OTHER_COMMANDS, OTHER_NAMES, nearest_flag, unknown_words

NEEDED = ["--model_name_or_path", "m", "--edits", "e", "--output_dir", "o"]


@cache
def flags_of(command: str) -> set[str]:
    """Return the flags of a command, as its help shows them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help-all" if command in ("train", "evaluate", "locate", "baselines") else "--help"])
    return set(re.findall(r"^  (?:-h, )?--(\w+)", printed.getvalue(), re.MULTILINE))


SLIPS: dict[str, tuple[list[str], str]] = {
    "lr": (["train", *NEEDED, "--lr", "1e-4"], "unrecognized arguments: --lr 1e-4. Did you mean --learning_rate?"),
    "model": (
        ["train", "--model", "m", "--data", "e", "--output", "o"],
        "unrecognized arguments: --model m --data e --output o. "
        "Did you mean --model_name_or_path, --edits, --output_dir?",
    ),
    "epochs": (["train", "--epochs=3"], "unrecognized arguments: --epochs=3. Did you mean --num_train_epochs?"),
    "batch size": (
        ["train", *NEEDED, "--batch-size", "4"],
        "unrecognized arguments: --batch-size 4. Did you mean --per_device_train_batch_size?",
    ),
    "file": (["evaluate", "--file", "e"], "unrecognized arguments: --file e. Did you mean --edits?"),
    "short": (["train", "-m", "m"], "unrecognized arguments: -m m. Did you mean --model_name_or_path?"),
    "misspelt flag": (["train", *NEEDED, "--recip", "x"], "unrecognized arguments: --recip x. Did you mean --recipe?"),
    "layers": (["train", "--layers", "1"], "unrecognized arguments: --layers 1. Did you mean --layers_to_transform?"),
    "flag of another command": (
        ["train", *NEEDED, "--tasks", "piqa"],
        "unrecognized arguments: --tasks piqa. --tasks is a flag of `locft evaluate`.",
    ),
    "of another command, to a light one": (
        ["merge", "a", "b", "c", "--to", "peft"],
        "unrecognized arguments: --to peft. --to is a flag of `locft export`.",
    ),
    "misspelt choice": (
        ["train", *NEEDED, "--recipe", "balancd"],
        "argument --recipe: invalid choice: 'balancd' (choose from published, balanced). Did you mean balanced?",
    ),
    "misspelt choice of a light command": (
        ["export", "a", "b", "--to", "pefd"],
        "argument --to: invalid choice: 'pefd' (choose from peft, lora, weights, small, gguf-lora). "
        "Did you mean peft?",
    ),
    "word without a flag": (
        ["train", *NEEDED, "facts.csv"],
        "unrecognized arguments: facts.csv. A value needs a flag before it, such as --edits facts.csv.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_ends_with_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = SLIPS[name]
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    said = re.sub(
        r"(choose from )([^)]*)", lambda found: found[1] + found[2].replace("'", ""), capsys.readouterr().err
    )
    assert said == f"locft {argv[0]}: {message}\n"


def test_a_flag_without_a_value_or_an_idea_comes_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        ([*NEEDED, "--learning_rate"], "argument --learning_rate: expected one argument"),
        ([*NEEDED, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([], "the following arguments are required: --model_name_or_path, --edits, --output_dir"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *argv])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"locft train: {message}\nusage: locft train --model_name_or_path")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["eval"], "did you mean 'evaluate'?"),
        (["undo"], "did you mean 'detach'?"),
        (["--model", "m"], "the command comes first, such as `locft train FLAGS`"),
    ],
)
def test_a_slip_at_the_command(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert (
        capsys.readouterr().err
        == f"locft: unknown command '{argv[0]}'; {message}\n`locft --help` lists the commands.\n"
    )


def test_help_is_a_word_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    assert capsys.readouterr().out.startswith("usage: locft COMMAND")
    with pytest.raises(SystemExit) as stopped:
        main(["help", "merge"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("usage: locft merge")


def test_help_goes_before_a_slip(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--lr", "3", "--help"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("usage: locft train")


def test_what_is_suggested_is_there() -> None:
    everywhere = set().union(*map(flags_of, COMMANDS))
    assert {flag for meant in OTHER_NAMES.values() for flag in meant} <= everywhere
    assert set(OTHER_COMMANDS.values()) <= set(COMMANDS) and not set(OTHER_COMMANDS) & set(COMMANDS)
    for command, flags in FLAGS_OF.items():
        assert set(flags) <= flags_of(command)
    for name, meant in OTHER_NAMES.items():
        assert name not in meant
        for command in COMMANDS:
            near = nearest_flag(name, flags_of(command))
            assert near is None or near in flags_of(command)


def test_values_of_unknown_flags_stay_with_them() -> None:
    words = ["--a", "1", "--lr", "-3", "x", "--edits=e", "y", "--", "--no"]
    assert unknown_words(words, {"--a", "--edits"}) == [["--lr", "-3", "x"]]
