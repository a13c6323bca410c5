"""How every picture of ours looks, and how it becomes a file or a part of a page.

Pictures look the same whatever the user's matplotlib settings are, and leave those settings, the backend and pyplot's
figures unchanged.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# on a light page, on a dark one; all differ, since `svg_element` replaces each by a CSS variable
COLOURS = {
    "ink": ("#1f2933", "#e4e7eb"),
    "muted": ("#616e7c", "#9aa5b1"),
    "grid": ("#e1e5ea", "#36414d"),
    "before": ("#b4bec9", "#66727f"),
    "after": ("#2f6fb3", "#4b8acb"),
    "reliability": ("#2f6fb4", "#6ea8e1"),
    "generalization": ("#b35c00", "#eb9b45"),
    "locality": ("#1c8a5f", "#55c797"),
    "portability": ("#8e4f9e", "#c88fd6"),
    "edit_score": ("#52606e", "#b8c2cd"),
}
TEXT_POINTS = 9
STYLE: dict[str, Any] = {
    "font.size": TEXT_POINTS,
    "text.color": COLOURS["ink"][0],
    "axes.edgecolor": COLOURS["grid"][0],
    "axes.labelcolor": COLOURS["muted"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": TEXT_POINTS,
    "grid.color": COLOURS["grid"][0],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"][0],
    "ytick.color": COLOURS["muted"][0],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 200,
    # text stays text in a page, and the same report gives the same file
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-locft",
}


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def drawing() -> Iterator[None]:
    """Use our style instead of the user's for a while."""
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'peft-locft[plot]'") from error
    with matplotlib.style.context(["default", STYLE]):
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, atomically.

    Raises:
        ValueError: if matplotlib does not know the file's ending.
    """
    kind = path.suffix.lower().removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path}: found the ending {path.suffix or 'none'!r}; expected one of .{', .'.join(known)}")
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    write_atomically(path, content.getvalue())


def svg_element(figure: Figure, prefix: str) -> str:
    """Return a picture as an SVG element for a page, which must define our colours as CSS variables.

    Args:
        figure: the picture.
        prefix: of its ids, another one for each picture of a page.
    """
    content = io.StringIO()
    figure.savefig(
        content, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = content.getvalue()
    text = text[text.index("<svg") :]
    # its style sheet would apply to the whole page, whose own style sheet has the same rules
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # an id must be unique in the page
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name.replace('_', '-')})")
    return text
