"""HTML that is escaped by the way it is built: whatever is not made here is text."""

from __future__ import annotations

from html import escape


class Html(str):
    """HTML already, to go into a page as it is."""

    __slots__ = ()


def element(name: str, *content: object, **attributes: str | None) -> Html:
    """Return an element.

    Args:
        name: of the element.
        content: [`Html`] as it is; anything else as text, escaped.
        attributes: escaped; `class_` is `class`, `aria_label` is `aria-label`; those that are `None` are left out.

    Example:
        >>> element("p", "1 < 2 ", element("b", "&"), class_="note")
        '<p class="note">1 &lt; 2 <b>&amp;</b></p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    return Html(f"<{name}{opening}>{together(*content)}</{name}>")


def together(*content: object) -> Html:
    """Return pieces of content one after another."""
    return Html("".join(each if isinstance(each, Html) else escape(str(each)) for each in content))


def scrolling(table: Html, label: str) -> Html:
    """Return a table in a box of its own, in which it scrolls where it is too wide, by keyboard too."""
    return element("div", table, class_="box", role="region", tabindex="0", aria_label=label)
