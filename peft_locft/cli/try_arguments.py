"""The words of `locft try`: adapters, questions, and flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from .parser import DASHES, CommandParser

USAGE = """ADAPTER [ADAPTER ...] ["QUESTION" ...] [flags]
ADAPTER [ADAPTER ...] --web [flags]"""
LOADING = ("model_name_or_path", "revision", "dtype", "trust_remote_code", "allow_other_base")
ASKING = ("chat_template", "max_new_tokens", "scale", "together")
PAGE = ("host", "port", "output_dir")


@dataclass(frozen=True)
class TryArguments:
    """What `locft try` is told.

    Args:
        adapters: the adapters.
        questions: the questions; none: standard input has them.
        loading: arguments of `AdapterComparison.load`.
        asking: arguments of `AdapterComparison.ask`.
        page: arguments of `serve_comparison`; `None`: answer in the terminal.
    """

    adapters: list[str]
    questions: list[str]
    loading: dict[str, Any]
    asking: dict[str, Any]
    page: dict[str, Any] | None


def parse_try(argv: Sequence[str]) -> TryArguments:
    """Return the arguments from the words after `locft try`.

    The first word is an adapter. Words after it that are folders are adapters too; what follows are questions.

    Raises:
        SystemExit: from argparse, if a flag is unknown or malformed, or does not go with the others.
    """
    parser = _parser()
    options, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        parser.refuse(unknown)
    given = {name: value for name, value in vars(options).items() if value is not None}
    first, *rest = options.words
    adapters = [first, *takewhile(lambda word: Path(word).is_dir(), rest)]
    questions = options.words[len(adapters) :]
    loading, asking, page = (
        {name: given[name] for name in names if name in given} for names in (LOADING, ASKING, PAGE)
    )
    if page and not options.web:
        parser.error(f"--{next(iter(page))} has no effect without --web")
    if options.web and (asking or questions):
        surplus = f"--{next(iter(asking))}" if asking else repr(questions[0])
        parser.error(f"--web shows a page on which you ask and choose: leave out {surplus}")
    return TryArguments(adapters, questions, loading, asking, page if options.web else None)


def _parser() -> CommandParser:
    parser = CommandParser("try", USAGE, "Show answers of the base model and of adapters side by side.", epilog=DASHES)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ADAPTER, QUESTION",
        help="Adapter: a folder or a name on the Hub; more adapters: folders. Then questions. Without a question: a "
        "prompt on a terminal, else one question per line of standard input.",
    )
    add = parser.add_argument
    add(
        "--chat_template",
        action="store_true",
        default=None,
        help="Ask in chat. Default: as the adapters were trained.",
    )
    add(
        "--no_chat_template", dest="chat_template", action="store_false", default=None, help="Continue the plain text."
    )
    add("--together", action="store_true", default=None, help="Also answer with all adapters at once.")
    add("--scale", type=float, help="Strength of the deltas, 0 for the base; replaces the adapters' own scale.")
    add("--max_new_tokens", type=int, help="Largest number of tokens in an answer. Default: 64.")
    add("--web", action="store_true", help="Show a page for the browser instead; needs the extra `web`.")
    add("--host", help="Address of the page. Default: 127.0.0.1, this machine only. 0.0.0.0: every machine around.")
    add("--port", type=int, help="Port of the page. Default: the first free one from 7860.")
    add("--output_dir", metavar="FOLDER", help="Folder for adapters trained on the page. Default: a temporary one.")
    add("--model_name_or_path", metavar="MODEL", help="Base model. Default: the one that the adapters name.")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="Precision of the base model.")
    add("--trust_remote_code", action="store_true", default=None, help="Run code that comes with the base model.")
    add("--allow_other_base", action="store_true", default=None, help="Take adapters that have another base.")
    return parser
