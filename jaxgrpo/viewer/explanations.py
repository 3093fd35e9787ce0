"""docs/metrics.md as a page of the viewer: each metric's row and each section can be linked to."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

SOURCE = Path(__file__).parent / "metrics.md"
"""In the repository a link to docs/metrics.md; in an installed package a copy of it."""
_READER = MarkdownIt("commonmark", {"html": False}).enable("table")


def anchor(key: str) -> str:
    """Return the anchor of the row that explains a metric, "" if none does. Version 0.1.0 called
    fractions shares."""
    now = re.sub(r"_share$", "_fraction", key)
    found = next((pattern for pattern in _keys() if _fits(pattern, now)), "")
    return f"metric-{_slug(found)}" if found else ""


@functools.cache
def page() -> Markup:
    """Return the page as HTML. Its links lead to its own sections; others are left out, because
    what they lead to is not installed."""
    tokens, heading, columns, column = _tokens(), "", list[str](), 0
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = tokens[place + 1].content
            token.attrSet("id", f"about-{_slug(heading)}")
        elif token.type == "table_open":
            token.meta["about"] = heading
            columns = []
        elif token.type == "th_open":
            columns.append(tokens[place + 1].content)
        elif token.type == "tr_open":
            column = 0
            if key := _key(tokens, place):
                token.attrSet("id", f"metric-{_slug(key)}")
        elif token.type == "td_open":
            token.attrSet("data-label", columns[column])
            column += 1
        elif token.type == "inline":
            token.children = list(_own_links(token.children or []))
    return Markup(_READER.renderer.render(tokens, _READER.options, {}))


def _table_open(_renderer: object, tokens: Sequence[Token], place: int, *_: object) -> str:
    about = escape(tokens[place].meta["about"])
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{about}"><table>'


_READER.add_render_rule("table_open", _table_open)
_READER.add_render_rule("table_close", lambda *_: "</table></div>")


@functools.cache
def contents() -> tuple[tuple[str, str, str], ...]:
    """Return the page's sections: anchor, title and level (h2 or h3)."""
    tokens = _tokens()
    opened = [
        (token.tag, tokens[n + 1].content)
        for n, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    return tuple((f"about-{_slug(title)}", title, tag) for tag, title in opened if tag != "h1")


@functools.cache
def _keys() -> tuple[str, ...]:
    tokens = _tokens()
    rows = (place for place, token in enumerate(tokens) if token.type == "tr_open")
    return tuple(key for place in rows if (key := _key(tokens, place)))


def _tokens() -> list[Token]:
    return _READER.parse(SOURCE.read_text(encoding="utf-8"))


def _key(tokens: Sequence[Token], row: int) -> str:
    """Return the metric that a row explains: the code in its first cell."""
    cell = tokens[row + 2].children or []
    return cell[0].content if [each.type for each in cell] == ["code_inline"] else ""


def _fits(pattern: str, key: str) -> bool:
    """Whether the key fits: `reward/<part>` stands for any one part."""
    parts = re.split(r"<\w+>", pattern)
    return re.fullmatch(".+".join(map(re.escape, parts)), key) is not None


def _own_links(children: Sequence[Token]) -> Iterator[Token]:
    kept = True
    for child in children:
        if child.type == "link_open":
            target = str(child.attrGet("href"))
            kept = target.startswith("#")
            child.attrSet("href", f"#about-{target[1:]}")
        if kept or child.type not in ("link_open", "link_close"):
            yield child


def _slug(text: str) -> str:
    """Return an anchor as GitHub makes it of a heading; the parts of a key are joined by dashes."""
    return re.sub(r"[^\w-]", "", re.sub(r"[\s/]", "-", text.lower()))
