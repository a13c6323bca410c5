"""The parser of every command: one style of flags, help in titled sections, and one line for a mistake."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .slips import hint_at_choice, hints, unknown_words

DASHES = "Every flag may be written with dashes or with underscores."
INHERITED = "flags of transformers.TrainingArguments"
PLACEHOLDERS = {
    "chat_template_kwargs": "JSON",
    "base_model_name_or_path": "MODEL",
    "edits": "FILE",
    "forget": "FILE",
    "judge": "URL|MODEL",
    "location": "FILE",
    "model_name_or_path": "MODEL",
    "output_dir": "FOLDER",
    "text": "FILE",
    "trained_edits": "FILE",
}


class CommandParser(argparse.ArgumentParser):
    """A parser of `locft COMMAND`, whose flags take dashes and underscores alike.

    Args:
        command: the word after `locft`.
        usage: the words after the command; a line for each form of a call.
        description: what the command does, in a sentence.
        sections: by title, the names of the flags that `--help` shows. The others are shown by `--help-all`. `None`:
            `--help` shows all flags.
        **options: whatever `ArgumentParser` takes, or the next class in line.
    """

    def __init__(
        self,
        command: str,
        usage: str,
        description: str,
        sections: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        self.sections = sections
        self.inherited: frozenset[str] = frozenset()  # names of flags that `--help-all` shows last
        prog = f"locft {command}"
        super().__init__(
            prog=prog,
            usage="\n       ".join(f"{prog} {line}" for line in usage.splitlines()),
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            add_help=False,
            **options,
        )
        self.add_argument("-h", "--help", action="help", help="Show this help text and exit.")
        if sections is not None:
            self.add_argument("--help-all", action=ShowAllFlags, help="Show all flags and exit.")

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an argument under both spellings of its name."""
        return super().add_argument(*dict.fromkeys(both for name in names for both in spellings(name)), **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, or exit with 2 and name the words that are no flags."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; but first exit with 2 if there are flags that are none, and say what they may mean.

        argparse would first miss the required flags that these words were meant to be.
        """
        words = list(sys.argv[1:] if args is None else args)
        asks_for_help = {"-h", "--help", "--help-all", "--help_all"} & set(words)
        unknown = [] if asks_for_help else unknown_words(words, self._option_string_actions)
        if unknown:
            self.refuse_flags(unknown)
        return super().parse_known_args(words, namespace)

    def refuse_flags(self, unknown: Sequence[Sequence[str]]) -> NoReturn:
        """Exit with 2 because of flags that are none, each given with its values."""
        flags = [action.dest for action in self._actions if action.option_strings]
        advice = hints([flag for flag, *_ in unknown], self.prog.split()[-1], flags)
        self.error(f"unrecognized arguments: {' '.join(word for words in unknown for word in words)}", advice)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with 2 because of words that belong to no flag."""
        self.refuse_flags([unknown])

    def error(self, message: str, advice: str = "") -> NoReturn:
        """Exit with 2: one line about the mistake; without advice also the usage, and where the flags are listed."""
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # argparse names all spellings of a flag
        advice = advice or hint_at_choice(message)
        if advice:
            self.exit(2, f"{self.prog}: {message}. {advice}\n")
        help_flag = "--help" if self.sections is None else "--help-all"
        self.exit(2, f"{self.prog}: {message}\n{self.format_usage()}`{self.prog} {help_flag}` lists the flags.\n")

    def format_help(self, show_all: bool = False) -> str:
        """Return the help text: the sections, and with `show_all` the flags that are in none of them."""
        if self.sections is None:
            return super().format_help()
        flags = {action.dest: action for action in reversed(self._actions) if action.option_strings}
        listed = {name for names in self.sections.values() for name in names} | {"help", "help_all"}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, names in self.sections.items():
            add_section(formatter, title, [flags[name] for name in names])
        add_section(formatter, "help", [flags["help"], flags["help_all"]])
        others = [action for name, action in reversed(flags.items()) if name not in listed]
        if show_all:
            add_section(formatter, "other flags", [action for action in others if action.dest not in self.inherited])
            add_section(formatter, INHERITED, [action for action in others if action.dest in self.inherited])
        formatter.add_text(DASHES if show_all else f"`{self.prog} --help-all` shows all flags. {DASHES}")
        return formatter.format_help()


def spellings(name: str) -> list[str]:
    """Return a flag with underscores and with dashes, as it was given first; anything else as it is."""
    if not name.startswith("--"):
        return [name]
    return [name, f"--{name[2:].replace('-', '_')}", f"--{name[2:].replace('_', '-')}"]


def add_section(formatter: argparse.HelpFormatter, title: str, actions: Iterable[argparse.Action]) -> None:
    """Add flags under a title."""
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()


class ShowAllFlags(argparse.Action):
    """Prints the help text with every flag, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        sys.stdout.write(parser.format_help(show_all=True))
        parser.exit()


class HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of a flag, a short placeholder, and the defaults that say something."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **({"max_help_position": 30} | options))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0 or is_switch(action):
            shown = action.option_strings[:2] if action.dest == "help" else action.option_strings[:1]
            return ", ".join([*shown, *([f"--no_{action.dest}"] if action.default is True else [])])
        return (
            f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} ..."
        return super()._format_args(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        # of `best_metric`: METRIC
        by_name = PLACEHOLDERS.get(action.dest, action.dest.rpartition("_")[2].upper())
        return {int: "N", float: "X"}.get(action.type, by_name)  # type: ignore[call-overload]

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", getattr(action.default, "value", action.default)
        if default is None or isinstance(default, bool) or default in ("", [], argparse.SUPPRESS):
            return text
        if "default" in text.lower():
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def is_switch(action: argparse.Action) -> bool:
    """Return whether a flag needs no value: it is one of argparse's own, or a yes or no."""
    return action.nargs == "?" and action.const is True and action.metavar is None
