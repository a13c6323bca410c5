"""`locft try`: which words are adapters and which questions, flags, standard input, and a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import FACTS, save_base, save_learned

from peft_locft.cli import main
from peft_locft.cli.try_arguments import parse_try
from peft_locft.workflows import AdapterComparison

PROMPT, TARGET = FACTS[0].prompt, FACTS[0].target


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_base(tmp_path_factory.mktemp("base"))
    return save_learned(tmp_path_factory.mktemp("adapters") / "facts", base, FACTS)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_questions_on_the_command_line_are_answered(facts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", str(facts), PROMPT, "The river runs", "--max_new_tokens", "4"]) == 0
    comparison = AdapterComparison.load([facts])
    expected = comparison.ask_all([PROMPT, "The river runs"], max_new_tokens=4)
    assert capsys.readouterr().out == "".join(f"{answers.to_text(80)}\n\n" for answers in expected)


def test_lines_of_standard_input_are_questions(
    facts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["try", str(facts), PROMPT]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n{PROMPT}\n\n"))
    assert main(["try", str(facts)]) == 0
    assert capsys.readouterr().out == expected


def test_a_terminal_asks_until_an_empty_line(
    facts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["city " * 100, PROMPT, "", "never asked"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["try", str(facts), "--max_new_tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("facts (") == 1
    assert "Ask a question. An empty line or Ctrl-D ends." in printed.err
    assert "Shorten the prompt" in printed.err, "a question that does not fit does not end it"
    assert next(lines) == "never asked"


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt])
def test_a_terminal_ends_quietly(facts: Path, monkeypatch: pytest.MonkeyPatch, ending: type[BaseException]) -> None:
    def end(prompt: str) -> str:
        raise ending

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", end)
    assert main(["try", str(facts)]) == 0


def test_folders_first_then_questions(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    found = parse_try([str(one), str(two), "What?", str(one)])
    assert (found.adapters, found.questions) == ([str(one), str(two)], ["What?", str(one)])
    # the first is an adapter whatever it is, such as a name on the Hub
    assert parse_try(["somebody/edits", "What?"]).adapters == ["somebody/edits"]


@pytest.mark.parametrize(
    ("words", "asking"),
    [
        (["What?"], {}),
        (["--chat_template", "What?"], {"chat_template": True}),
        (["--no-chat-template", "What?", "--scale", "0"], {"chat_template": False, "scale": 0.0}),
        (["--together", "What?", "--max-new-tokens=9"], {"together": True, "max_new_tokens": 9}),
    ],
)
def test_flags_stand_anywhere(words: list[str], asking: dict[str, Any]) -> None:
    found = parse_try(["adapter", *words])
    assert (found.adapters, found.questions, found.asking) == (["adapter"], ["What?"], asking)
    assert (found.loading, found.page) == ({}, None)


def test_flags_of_the_page_and_of_loading() -> None:
    found = parse_try(["adapter", "--web", "--port", "7861", "--dtype", "bfloat16", "--allow_other_base"])
    assert found.page == {"port": 7861}
    assert found.loading == {"dtype": "bfloat16", "allow_other_base": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required"),
        (["adapter", "--scal", "1"], "unrecognized arguments: --scal 1. Did you mean --scale?"),
        (["adapter", "--host", "::"], "--host has no effect without --web"),
        (["adapter", "--web", "What?"], "--web shows a page on which you ask and choose: leave out 'What?'"),
        (["adapter", "--web", "--scale", "1"], "leave out --scale"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["try", *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.partition("\nusage")[0]


def test_what_is_no_adapter_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", str(tmp_path / "nothing"), "What?"]) == 2
    assert capsys.readouterr().err.startswith(f"locft try: {tmp_path}/nothing: found no adapter")


def test_without_gradio_the_page_says_how_to_get_it(
    facts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["try", str(facts), "--web"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("locft try: The page needs gradio")
    assert message.endswith("pip install 'peft-locft[web]'\n")
