"""What is true of the source as a whole: twelve rooms in one order, no circles, public names, a quiet import."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import peft_locft

PACKAGE = Path(peft_locft.__file__).parent
# a room imports from rooms above it
ROOMS = (
    "io",
    "tuner",
    "engine",
    "data",
    "evaluation",
    "adapters",
    "locating",
    "training",
    "merging",
    "reporting",
    "workflows",
    "cli",
)
SOURCES = sorted(PACKAGE.rglob("*.py"))
IN_ROOMS = [path for path in SOURCES if path.parent != PACKAGE]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 500, 50
HEAVY = ("torch", "peft", "transformers", "datasets", "accelerate", "numpy")


def imported(source: str, path: Path) -> set[Path]:
    """Return the files of the package that a source imports from, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {place_of(alias.name.split(".")[1:], "") for alias in node.names if "peft_locft" in alias.name}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*path.relative_to(PACKAGE).parts[: -node.level], *module]
            elif module[:1] == ["peft_locft"]:
                module = module[1:]
            else:
                continue
            found |= {place_of(module, alias.name) for alias in node.names}
    return found


def place_of(module: list[str], name: str) -> Path:
    as_module = PACKAGE.joinpath(*module, name).with_suffix(".py")
    as_folder = PACKAGE.joinpath(*module)
    return (
        as_module
        if name and as_module.is_file()
        else next(place for place in (as_folder.with_suffix(".py"), as_folder / "__init__.py") if place.is_file())
    )


def room_of(path: Path) -> int:
    return ROOMS.index(path.relative_to(PACKAGE).parts[0])


def upward(source: str, path: Path) -> list[str]:
    """Return the files of later rooms that a source imports."""
    inside = [target for target in imported(source, path) if target.parent != PACKAGE]
    return sorted(str(target.relative_to(PACKAGE)) for target in inside if room_of(target) > room_of(path))


def test_the_package_has_these_rooms_and_no_others() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)


@pytest.mark.parametrize("path", IN_ROOMS, ids=[str(path.relative_to(PACKAGE)) for path in IN_ROOMS])
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    assert upward(path.read_text(), path) == []


def test_an_upward_import_is_seen() -> None:
    source = "import torch\ndef f():\n    from ..adapters import card\n    import peft_locft.cli.commands\n"
    assert upward(source, PACKAGE / "tuner" / "config.py") == ["adapters/card.py", "cli/commands.py"]
    assert upward("from ..io.files import atomic_file\nfrom .delta import Delta", PACKAGE / "tuner" / "x.py") == []


def test_the_tuner_imports_from_no_other_room_than_io() -> None:
    targets = {target for path in IN_ROOMS if room_of(path) == 1 for target in imported(path.read_text(), path)}
    assert {target.relative_to(PACKAGE).parts[0] for target in targets} == {"io", "tuner"}


def test_files_import_each_other_without_a_circle() -> None:
    # raises CycleError, with the circle
    TopologicalSorter({path: imported(path.read_text(), path) - {path} for path in IN_ROOMS}).prepare()


def lines_of(function: ast.FunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    return lines if docstring is None else lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: lines_of(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > LINES_OF_A_FUNCTION} == {}


@pytest.mark.parametrize("name", ["peft_locft", *(f"peft_locft.{room}" for room in ROOMS)])
def test_public_names_are_sorted_there_and_documented(name: str) -> None:
    module = importlib.import_module(name)
    public = [each for each in module.__all__ if not each.startswith("__")]
    assert public == sorted(public)
    assert [each for each in public if not inspect.getdoc(getattr(module, each))] == []
    if name != "peft_locft.tuner":  # the others load their names on demand
        assert sorted(dir(module)) == sorted(module.__all__)
    for each in public:  # a module of the same name must not take its place
        assert not inspect.ismodule(getattr(module, each))


@pytest.mark.parametrize("statement", ["import peft_locft", "import peft_locft.cli; peft_locft.cli.main(['--help'])"])
def test_nothing_heavy_is_imported_for_a_help_text(statement: str) -> None:
    code = f"{statement}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"


# what an import must leave as it is; heavy imports first, which change some of it themselves
IMPORT_QUIETLY = """
import json, logging, os, random, warnings
import numpy, peft, torch, transformers

def snapshot():
    return {
        "random": repr(random.getstate()),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "handlers": repr(logging.root.handlers),
        "levels": {n: logging.getLogger(n).level for n in ("", "transformers", "peft", "peft_locft")},
        "filters": repr(warnings.filters),
        "environment": dict(os.environ),
        "files": sorted(os.listdir()),
    }

before = snapshot()
import peft_locft
after = snapshot()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


def test_the_import_does_nothing_but_register(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-c", IMPORT_QUIETLY]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == []
