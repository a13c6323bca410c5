"""The parser of the commands whose flags are fields of configurations, on the command line or in a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..data.chat import chat_template_mode, template_arguments
from .parser import CommandParser
from .slips import nearest_flag


class FieldsParser(CommandParser, HfArgumentParser):
    """A parser whose flags are the fields of dataclasses, on the command line or in a YAML file.

    Args:
        command: the word after `locft`.
        usage: the words after the command.
        description: what the command does, in a sentence.
        sections: by title, the names of the flags that `--help` shows.
        help_texts: by name, our help text of a flag of transformers.
        types: the dataclasses.
    """

    def __init__(
        self,
        command: str,
        usage: str,
        description: str,
        sections: Mapping[str, Sequence[str]],
        help_texts: Mapping[str, str],
        types: tuple[type, ...],
    ) -> None:
        sections = {**sections, "flags from a file": ["config"]}
        super().__init__(command, usage, description, sections, dataclass_types=types)
        self.flags = {action.dest: action for action in self._actions if action.dest not in ("help", "help_all")}
        self.inherited = frozenset(inherited_fields(types) - help_texts.keys())
        for name, text in help_texts.items():
            self.flags[name].help = text
        if "chat_template" in self.flags:
            # one of several words, or a yes or no; the flag alone is a yes
            self.flags["chat_template"].nargs = "?"
            self.flags["chat_template"].type = _checked(chat_template_mode)
            self.flags["chat_template"].const, self.flags["chat_template"].metavar = "on", "MODE"
            self.flags["chat_template_kwargs"].type = _checked(template_arguments)
        if "report_to" in self.flags:
            # TrainingArguments has a folder of its own choice, and takes one name only
            self.require("output_dir", required=True)
            self.flags["report_to"].nargs = "+"
        self.add_argument("--config", metavar="FILE", help="YAML file with flags as `name: value` lines.")

    def require(self, *names: str, required: bool) -> None:
        """Make flags required, or not."""
        for name in names:
            self.flags[name].required = required

    def parse_fields(self, words: Sequence[str]) -> tuple[Any, ...]:
        """Return an object of each dataclass."""
        *parsed, _, unknown = self.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.refuse(unknown)
        return tuple(parsed)

    def with_config_file(self, argv: Sequence[str]) -> list[str]:
        """Return the words of the YAML file of `--config`, if there is one, and then the words that are given.

        As words, both are checked alike; of two with the same name argparse takes the later one.

        Raises:
            ValueError: if the file cannot be read, or has a key that is no flag or has no value.
        """
        path = value_of("config", argv)
        if path is None:
            return list(argv)
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(
                f"--config {path}: found {type(content).__name__}, expected flags as `name: value` lines."
            )
        unknown = sorted(str(name) for name in content if str(name).replace("-", "_") not in self.flags)
        if unknown:
            meant = [near for name in unknown if (near := nearest_flag(name, self.flags))]
            hint = f" Did you mean {', '.join(f'--{name}' for name in meant)}?" if meant else ""
            raise ValueError(
                f"--config {path}: unknown keys {', '.join(unknown)}.{hint} `{self.prog} --help-all` lists the flags."
            )
        empty = [name for name, value in content.items() if value is None or value == []]
        if empty:
            raise ValueError(f"--config {path}: {', '.join(empty)} without a value. Give one, or remove the line.")
        return [word for name, value in content.items() for word in words_of(name, value)] + list(argv)


def _checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a function that reads a word, and whose message argparse shows."""

    def value_of_word(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return value_of_word


def inherited_fields(types: Iterable[type]) -> set[str]:
    """Return the names of the fields that dataclasses have from transformers and do not declare again."""
    classes = [each for kind in types for each in kind.__mro__ if dataclasses.is_dataclass(each)]
    theirs = [each for each in classes if each.__module__.partition(".")[0] == "transformers"]
    ours = {name for each in classes if each not in theirs for name in vars(each).get("__annotations__", {})}
    return {field.name for each in theirs for field in dataclasses.fields(each)} - ours


def value_of(name: str, words: Sequence[str]) -> str | None:
    """Return the value of one flag, before the others are parsed; None if it is not given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    try:
        return getattr(early.parse_known_args(list(words))[0], name)
    except argparse.ArgumentError:
        return None  # it has no value, and the parser of the command says so


def words_of(name: str, value: Any) -> list[str]:
    """Return a flag with its value as words of a command line."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # in one word, so that a value may begin with a minus
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
