"""Tables of the page: every text is escaped, and a wide table scrolls inside its own frame."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["Markup", "table"]


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def table(label: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """HTML of a table; ``label`` tells a screen reader what scrolls.

    Example:
        >>> "a &lt; b" in table("signs", ("sign",), [("a < b",)])
        True
    """
    head = "".join(f"<th scope='col'>{_shown(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_shown(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    frame = f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(label)}'>"
    return f"{frame}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _shown(cell: str) -> str:
    return cell if isinstance(cell, Markup) else escape(cell)
