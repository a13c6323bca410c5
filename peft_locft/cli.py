"""`locft train | inspect`: parse, call one public function, print."""

from __future__ import annotations

import sys
import time
from typing import Any

USAGE = """usage: locft COMMAND ...

commands:
  train     write a file of edits into a model and save the adapter
  inspect   print what an adapter folder holds

`locft COMMAND --help` lists the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after `locft`; `None` takes them from the process.

    Returns:
        The exit code: 0, or 2 for a mistake in the call or its files.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        print(f"locft: unknown command '{command}'; expected one of {', '.join(COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except (ValueError, OSError) as error:
        print(f"locft {command}: {error}", file=sys.stderr)
        return 2
    return 0


def train(argv: list[str]) -> None:
    """Write a file of edits into a model and save the adapter."""
    from .command_line_arguments import parse_train
    from .training_run import train_edits

    arguments = parse_train(argv)
    begun = time.perf_counter()
    summary = train_edits(**arguments)
    if arguments["args"].process_index == 0:  # of several, under torchrun or accelerate launch
        print(f"Trained in {time.perf_counter() - begun:.0f} s, saved to {summary.folder}\n\n{summary}")


def inspect(argv: list[str]) -> None:
    """Print what an adapter folder holds."""
    import argparse

    from .inspection import inspect_adapter

    parser = argparse.ArgumentParser(prog="locft inspect", description=inspect.__doc__)
    parser.add_argument("adapter", help="a local adapter folder, of any PEFT method")
    print(inspect_adapter(parser.parse_args(argv).adapter))


COMMANDS: dict[str, Any] = {"train": train, "inspect": inspect}

if __name__ == "__main__":
    sys.exit(main())
