"""Names that somebody else chose, as files and pictures can take them."""

from __future__ import annotations

#: characters of a name in a picture
_LONGEST = 30


def printable(name: str) -> str:
    """Returns a name with escapes for what does not print: line ends, NUL, bytes that
    are no text."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in name
    )


def pictured(name: str) -> str:
    """Returns a name for matplotlib, which would read ``$`` as mathematics, and make
    the picture as wide as the longest."""
    text = printable(name)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    return text.replace("$", r"\$")
