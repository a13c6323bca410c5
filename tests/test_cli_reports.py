"""`locft compare`, and the judge of `locft evaluate`: what their flags become, and what is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_reports import example_report

from peft_locft.cli import main
from peft_locft.cli.arguments import parse_evaluate
from peft_locft.evaluation import JudgeConfig

EDITS = ["--edits", "edits.jsonl"]


def test_reports_are_compared_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        example_report().save(tmp_path / name / "evaluation")
    reports = [str(tmp_path / name / "evaluation") for name in ("one", "two")]
    assert main(["compare", *reports, "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| metric | before | one | two |" in printed
    assert printed.endswith(f"Saved to {tmp_path / 'out'}: open comparison.html in a browser.\n")
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert main(["compare", *reports]) == 0
    assert "Saved" not in capsys.readouterr().out


def test_a_folder_without_a_report_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "expected a folder that EvaluationReport.save wrote" in capsys.readouterr().err


def test_without_the_flag_there_is_no_judge() -> None:
    assert parse_evaluate(EDITS)["judge"] is None


def test_the_flags_of_the_judge_are_one_configuration() -> None:
    words = ["--judge", "http://host/v1", "--judge_model", "m", "--judge-concurrency", "2", "--judge_tokens", "9"]
    words += ["--judge_key_variable", "KEY", "--judge_request", '{"max_tokens": null}']
    arguments = parse_evaluate([*EDITS, *words])
    assert arguments["judge"] == JudgeConfig(
        "http://host/v1",
        model="m",
        concurrency=2,
        max_new_tokens=9,
        api_key_variable="KEY",
        request={"max_tokens": None},
    )
    assert not [name for name in arguments if name.startswith("judge_")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge_model", "m"], "--judge_model has no effect without --judge"),
        (["--judge", "http://host/v1"], "and no model"),
        (["--judge", "folder", "--judge_request", "[1]"], r"--judge_request: found '\[1\]'; expected a JSON object"),
        (["--judge", "folder", "--judge_request", "{"], "--judge_request: found '{'; expected a JSON object"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_evaluate([*EDITS, *words])
