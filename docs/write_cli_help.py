"""Write the help text of every command into docs/pages/cli.md: `python docs/write_cli_help.py`."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from unittest import mock

from peft_locft.cli import main

PAGE = Path(__file__).parent / "pages" / "cli.md"
# a comment that holds a call, and the block of its output
BLOCK = re.compile(r"(<!-- locft (.+?) -->\n```text\n).*?(?<=\n)(```\n)", re.DOTALL)


def help_text(call: str) -> str:
    """Return what `locft CALL` prints, 100 columns wide and without colours."""
    output = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(output),
        contextlib.suppress(SystemExit),
    ):
        main(call.split())
    return output.getvalue()


def with_help_texts(page: str) -> str:
    """Return a page with the current help text in each of its blocks."""
    return BLOCK.sub(lambda found: f"{found[1]}{help_text(found[2])}{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(with_help_texts(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
