"""What the README and the docs say is true of the package: names, commands, the quick start."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import peft_locft

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
PACKAGE = Path(peft_locft.__file__).parent
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def python_blocks(page: Path) -> Iterator[str]:
    for _, block in re.findall(r"^( *)```python\n(.*?)^\1```$", page.read_text(encoding="utf-8"), re.M | re.S):
        yield textwrap.dedent(block)


def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("public_names", ROOT / "docs" / "public_names.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_every_public_name_of_a_room(room: str) -> None:
    exported = importlib.import_module(f"peft_locft.{room}").__all__
    assert hook().public_names(room) == sorted(name for name in exported if not name.startswith("__"))
    assert f"\n::: peft_locft.{room}\n" in (ROOT / "docs" / "pages" / "reference.md").read_text(encoding="utf-8")


def test_the_reference_lists_the_names_of_the_package() -> None:
    names = set(re.findall(r"`(\w+)`", hook().package_table())) - {"peft_locft", *ROOMS}
    assert names == {name for name in importlib.import_module("peft_locft").__all__ if not name.startswith("__")}
    assert hook().TABLE in (ROOT / "docs" / "pages" / "reference.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_code_on_a_page_parses_and_imports_what_is_there(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_locft"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module


def test_the_readme_shows_the_quick_start_that_is_run() -> None:
    code = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert code in list(python_blocks(ROOT / "README.md"))


def test_the_readme_has_two_commands_of_which_the_second_tests() -> None:
    commands = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(commands) == 2
    assert commands[0].rstrip().endswith("examples/demo.py")
    assert " && .venv/bin/python -m pytest" in commands[1]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
