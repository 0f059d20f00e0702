"""Text that others wrote, such as names, metadata and tokens, as text: a function a medium.

Whatever shows such text uses one of these, or `geffect.plots.words.drawn` for pictures.
"""

import html
import re
import unicodedata

JOINERS = "\u200c\u200d"
"""What joins letters of some scripts, and the parts of some emoji."""

MARKUP = re.compile(r"([\\`*_{}\[\]<>|~$#&])")
"""What Markdown would read as its own."""


def plain(text: object) -> str:
    """The text on one line, for terminals: what does not print is written as its code.

    That is control characters and line breaks, which could move a cursor or forge a line, marks
    that turn the direction of writing, and halves of characters, which no file can hold.

    >>> plain("a\\x1b[31m\\nb\\u202ec"), plain("naïve 語 🙂")
    ('a\\\\x1b[31m\\\\nb\\\\u202ec', 'naïve 語 🙂')
    """
    written = str(text)
    if written.isprintable():
        return written
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode() for c in written)


def lines(text: object) -> str:
    """The text with its line breaks, for terminals.

    >>> lines("a\\nb\\r\\x00")
    'a\\nb\\\\r\\\\x00'
    """
    return "\n".join(map(plain, str(text).split("\n")))


def in_html(text: object) -> str:
    """The text in HTML, as an element's or an attribute's.

    >>> in_html("<script>'a' &amp; \\x00")
    '&lt;script&gt;&#x27;a&#x27; &amp;amp; \\\\x00'
    """
    return html.escape(plain(text))


def in_markdown(text: object) -> str:
    """The text in a line of Markdown, or in a cell of a table.

    >>> print(in_markdown("a|b <i> $x^$ [c](d)"))
    a\\|b \\<i\\> \\$x^\\$ \\[c\\](d)
    """
    return MARKUP.sub(r"\\\1", plain(text))


def _prints(character: str) -> bool:
    return (
        character.isprintable()
        or character in JOINERS
        or unicodedata.category(character) == "Zs"  # spaces of all widths
    )
