"""Text of models and tools for a page or a terminal: as text, with what would hide or act made
visible. Pure."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from jaxgrpo.viewer.turns import Part

MOST_SHOWN = 50_000
"""Characters of one text on a page; the raw text has all of them."""
BEFORE_HIT, AFTER_HIT = 60, 110
"""Characters of a snippet around the word that was found."""
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\uffff\ud800-\udfff\U000e0000-\U000e0fff]"
)


def name_of(char: str) -> str:
    """How a hidden character is written: the control pictures for the old ones, the code point
    for others."""
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"U+{code:04X}"


def plain(text: str) -> str:
    """For a terminal: hidden and control characters by their names."""
    return _HIDDEN.sub(
        lambda found: f"<{name_of(found[0])}>" if ord(found[0]) > 0x7F else name_of(found[0]), text
    )


def visible(text: str, most: int = MOST_SHOWN) -> Markup:
    """Return HTML: escaped, cut at `most` characters, hidden characters as marks with names."""
    parts, place = [], 0
    shown = text[:most]
    for found in _HIDDEN.finditer(shown):
        parts.append(escape(shown[place : found.start()]))
        title = unicodedata.name(found[0], "a control character").lower()
        parts.append(
            Markup('<span class="hidden-char" title="{}">{}</span>').format(
                title, name_of(found[0])
            )
        )
        place = found.end()
    parts.append(escape(shown[place:]))
    if len(text) > most:
        parts.append(
            Markup('<span class="cut">… {} more characters; the raw text has them</span>').format(
                f"{len(text) - most:,}"
            )
        )
    return Markup("").join(parts)


def marked(parts: Iterable[Part]) -> Markup:
    """Parts of a compared text; what differs is marked."""
    shown = [
        Markup("<mark>{}</mark>").format(visible(part.text)) if part.changed else visible(part.text)
        for part in parts
    ]
    return Markup("").join(shown)


def found(text: str, words: Iterable[str]) -> Markup:
    """A text with the words that were searched for marked."""
    pattern = _any_of(words)
    if pattern is None:
        return visible(text)
    parts, place = [], 0
    for hit in pattern.finditer(text[:MOST_SHOWN]):
        parts += [Part(text[place : hit.start()], False), Part(hit[0], True)]
        place = hit.end()
    return marked([*parts, Part(text[place:], False)])


def snippet(text: str, words: Sequence[str]) -> Markup | None:
    """The surroundings of the first word that was searched for, on one line, with the words marked;
    None if the text has none of them as they were typed."""
    whole, anywhere = _any_of(words, r"(?<!\w)"), _any_of(words)
    if whole is None or anywhere is None:
        return None
    if (hit := whole.search(text) or anywhere.search(text)) is None:
        return None
    start, end = max(0, hit.start() - BEFORE_HIT), hit.end() + AFTER_HIT
    shown = " ".join(text[start:end].split())
    if start:  # begin and end with whole words
        shown = shown[shown.find(" ", 0, 15) + 1 :]
    if end < len(text) and (cut := shown.rfind(" ", len(shown) - 15)) > 0:
        shown = shown[:cut]
    before, after = "… " if start else "", " …" if end < len(text) else ""
    return Markup("{}{}{}").format(before, found(shown, words), after)


def _any_of(words: Iterable[str], before: str = "") -> re.Pattern[str] | None:
    kept = sorted({word for word in words if word}, key=len, reverse=True)
    spaced = (r"\s+".join(map(re.escape, word.split())) for word in kept)
    return re.compile(f"{before}(?:{'|'.join(spaced)})", re.IGNORECASE) if kept else None


def pretty(text: str) -> str:
    """JSON over several lines, anything else as it is."""
    if len(text) > MOST_SHOWN or text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
