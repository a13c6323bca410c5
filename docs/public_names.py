"""Fills the reference with the public names of every room when the site is built, so that none can be missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent / "peft_locft"
ROOM = re.compile(r"^::: peft_locft\.(\w+)$", re.MULTILINE)
TABLE = "<!-- names of the package -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the names of the package, and of each `::: peft_locft.ROOM`, on the reference page; a mkdocs hook."""
    if page.file.src_uri != "reference.md":
        return markdown
    return ROOM.sub(directive, markdown).replace(TABLE, package_table())


def directive(found: re.Match[str]) -> str:
    members = "".join(f"        - {name}\n" for name in public_names(found[1]))
    return f"{found[0]}\n    options:\n      heading_level: 3\n      members:\n{members}"


def package_table() -> str:
    """Return a table of the names that `peft_locft` itself exports, a row for each room that they come from."""
    rooms: dict[str, list[str]] = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module != "_version":
            rooms.setdefault(str(node.module), []).extend(alias.name for alias in node.names)
    rows = [f"| `{room}` | {', '.join(f'`{name}`' for name in sorted(names))} |" for room, names in rooms.items()]
    return "\n".join(["| from the room | names in `peft_locft` |", "|---|---|", *rows])


def public_names(room: str) -> list[str]:
    """Return what a room exports: what its stub imports, or its `__all__`."""
    stub = PACKAGE / room / "__init__.pyi"
    tree = ast.parse((stub if stub.is_file() else stub.with_suffix(".py")).read_text(encoding="utf-8"))
    if stub.is_file():
        imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
        return sorted(alias.asname or alias.name for node in imports for alias in node.names)
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and _names_all(node))
    return sorted(ast.literal_eval(next(values)))


def _names_all(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
