"""The notebook of the examples runs from its first cell to its last, and is in the repository without outputs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "edit_facts.ipynb").read_text(encoding="utf-8"))


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_its_cells_are_plain_python() -> None:
    assert len(code_cells()) >= 5
    for cell in code_cells():
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        ast.parse("".join(cell["source"]))  # neither magics nor shell commands: the test below runs it without Jupyter
    identifiers = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.slow
def test_the_notebook_edits_the_model_and_takes_the_edits_out(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code_cells()), encoding="utf-8")
    # a notebook finds what lies beside it
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    metrics = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines() if "_match " in line}
    assert metrics["reliability_exact_match"] == 1.0, done.stdout
    assert "0 of 272 tensors differ from the original model" in done.stdout
    assert "edit_facts (same answer)" in done.stdout, "at scale 0"
    assert "edit_facts (changed)" in done.stdout, "at scale 1"
