"""Docstrings as reStructuredText."""

import doctest

import pytest

from geffect.analysis import SAMPLES
from tests.utils.site import extension

DOCSTRINGS = extension("docstrings")
KNOWN = {"geffect.analysis.cosine": "geffect.analysis.cosine", "geffect.Run": "geffect.Run"}


def as_rest(text: str, room: str = "geffect.analysis") -> str:
    def link(said: str) -> str | None:
        found: str | None = DOCSTRINGS.linked(said, room, f"{room}.conflict", KNOWN)
        return found

    return "\n".join(DOCSTRINGS.as_rest(text.splitlines(), link)).rstrip()


def test_its_example() -> None:
    assert doctest.testmod(DOCSTRINGS).failed == 0


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("One line.", "One line."),
        ("Two\nlines.", "Two lines."),
        ("|x| * y, a_b_ and <grad R>", r"\|x\| \* y, a\_b\_ and <grad R>"),
        ("- `x`: one,\n  two.", "``x``\n   one, two."),
        ("- `x`, `y` and `z`: all.", "``x``, ``y`` and ``z``\n   all."),
        ("- forget: falls.\n- retain: rises.", "- forget: falls.\n\n- retain: rises."),
        ("1. first\n   still\n2. second", "1. first still\n\n2. second"),
        (">>> f(1)\n2\n>>> g", ">>> f(1)\n2\n>>> g"),
        ("See\n\n    a = b + c_d", "See\n\n.. code-block:: none\n\n       a = b + c_d"),
        ("As\n\n    f(x)", "As\n\n.. code-block:: python\n\n       f(x)"),
        ("Names\nfollow:\n    a  b", "Names follow:\n\n.. code-block:: none\n\n       a  b"),
        ("A `word` of code.", "A ``word``\\  of code."),
        ("`words`s", "``words``\\ s"),
        ("See `cosine`.", r"See :py:obj:`cosine <geffect.analysis.cosine>`\ ."),
        ("See `geffect.Run`.", r"See :py:obj:`geffect.Run <geffect.Run>`\ ."),
        ("See `Run`.", r"See :py:obj:`Run <geffect.Run>`\ ."),
        ("See `conflict`.", r"See ``conflict``\ ."),
        ("a `code | with * marks`", r"a ``code | with * marks``\ "),
        ("a backslash \\ and `", r"a backslash \\ and \`"),
    ],
)  # fmt: skip
def test_what_becomes_of(written: str, read: str) -> None:
    assert as_rest(written) == read.rstrip()


def test_a_constant_has_what_stands_below_it() -> None:
    said = " ".join(DOCSTRINGS.of_constant("geffect.analysis.SAMPLES", SAMPLES))
    assert "table" in said and DOCSTRINGS.of_constant("geffect.analysis.SAMPLES", "") == []
