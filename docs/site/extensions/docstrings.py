"""Our docstrings as reStructuredText: what they list, show and name is marked up.

A docstring is written to be read as it stands. Here a list of names becomes a list of definitions,
an indented formula a literal block, and a name in backticks a link if this site has a page on it.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sphinx.pycode import ModuleAnalyzer

Link = Callable[[str], str | None]
"""From what stands in backticks to the full name of the page on it, if there is one."""

NAMES = re.compile(r"^- ((?:`[^`]+`(?:, | and )?)+): (.*)$")
BULLET = re.compile(r"^(?:- |\d+\. )")


def as_rest(lines: Iterable[str], link: Link = lambda name: None) -> list[str]:
    """The lines of a docstring in reStructuredText.

    >>> as_rest(["A sum of |x|.", "", "- `x`, `y`: numbers, not *all*", "  of them."])
    ['A sum of \\\\|x\\\\|.', '', '``x``, ``y``', '   numbers, not \\\\*all\\\\* of them.', '']
    """
    written: list[str] = []
    for block in blocks(lines):
        written += [*marked(block, link), ""]
    return written


def blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    """Paragraphs, lists with an item each, and examples, which end at an empty line."""
    block: list[str] = []
    for line in lines:
        example = bool(block) and block[0].startswith(">>>")
        ends = not line.strip()
        begins = not example and (BULLET.match(line) or line.startswith(">>>"))
        if block and (ends or begins):
            yield block
            block = []
        if not ends:
            block.append(line.rstrip())
    if block:
        yield block


def marked(block: list[str], link: Link) -> list[str]:
    """A block in reStructuredText."""
    first = block[0]
    if first.startswith(">>>"):
        return block
    if first.startswith("   "):
        language = "python" if is_python(block) else "none"
        return [f".. code-block:: {language}", "", *(f"   {line}" for line in block)]
    if found := NAMES.match(first):
        text = " ".join([found[2], *map(str.strip, block[1:])])
        names = re.sub(r"`([^`]+)`", r"``\1``", found[1])
        return [names, f"   {inline(text, link)}"]
    if bullet := BULLET.match(first):
        text = " ".join([first[bullet.end() :], *map(str.strip, block[1:])])
        return [f"{bullet[0]}{inline(text, link)}"]
    # An indented formula may follow its sentence at once.
    for row, line in enumerate(block):
        if line.startswith("    "):
            return [*marked(block[:row], link), "", *marked(block[row:], link)]
    return [inline(" ".join(block), link)]


def is_python(block: list[str]) -> bool:
    """Whether lines are statements that call something, and no formula."""
    try:
        read = ast.parse("\n".join(line[4:] for line in block))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(read))


def inline(text: str, link: Link) -> str:
    """A text whose code is marked up and whose other signs stand for themselves."""
    parts = re.split(r"(``?[^`]+``?)", text)
    parts[::2] = [re.sub(r"([\\*|_`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [code(part.strip("`"), link) for part in parts[1::2]]
    return "".join(parts)


def code(name: str, link: Link) -> str:
    """What stood in backticks: a link where there is a page on it."""
    target = link(name)
    # A backslash keeps what follows, such as a plural's s, from spoiling the mark-up.
    return rf":py:obj:`{name} <{target}>`\ " if target else rf"``{name}``\ "


def linked(said: str, room: str, name: str, links: dict[str, str]) -> str | None:
    """The full name of what a docstring names, if it is public and not the thing itself."""
    word = said.removesuffix("()")
    for full in (word, f"{room}.{word}", f"geffect.{word}"):
        if full in links and links[full] != name:
            return links[full]
    return None


def of_constant(name: str, value: object) -> list[str]:
    """What stands below a constant where it is defined: it has no docstring of its own."""
    last = name.rpartition(".")[2]
    for home, module in sorted(sys.modules.items()):
        if home.startswith("geffect.") and vars(module).get(last) is value:
            said = ModuleAnalyzer.for_module(home).find_attr_docs().get(("", last))
            if said:
                return [*said]
    return []


def spelt(signature: str) -> str:
    """A signature whose defaults can be read, by Sphinx too, which shortens types only then.

    >>> spelt("(a: dict = <factory>, b: object = <class 'contextlib.nullcontext'>)")
    '(a: dict = ..., b: object = nullcontext)'
    """
    named = r"<(?:class|function) '?(?:\w+\.)*(\w+)'?(?: at 0x\w+)?>"
    return re.sub(named, r"\1", signature.replace("<factory>", "..."))


def setup(app: Any) -> dict[str, Any]:
    """Rewrite the docstrings and the signatures that autodoc reads."""

    def rewrite(app: Any, what: str, name: str, found: object, _: object, lines: list[str]) -> None:
        links = app.env.geffect_names
        if what == "data" and "__doc__" not in getattr(found, "__dict__", ()):
            lines[:] = of_constant(name, found)
        room = name if what == "module" else name.rpartition(".")[0]
        lines[:] = as_rest(lines, lambda said: linked(said, room, name, links))

    def respell(
        app: Any, what: str, name: str, found: object, _: object, said: str | None, back: str | None
    ) -> tuple[str | None, str | None]:
        return said and spelt(said), back

    app.connect("autodoc-process-docstring", rewrite)
    app.connect("autodoc-process-signature", respell)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
