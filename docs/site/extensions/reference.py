"""A page of the reference for each room of the package, from its `__all__` and its docstrings."""

import importlib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOMS = (
    "geffect",
    "geffect.capture",
    "geffect.analysis",
    "geffect.plots",
    "geffect.projection",
    "geffect.objectives",
    "geffect.trainers",
    "geffect.evaluation",
    "geffect.audit",
    "geffect.edits",
    "geffect.effects",
    "geffect.requests",
    "geffect.risk",
    "geffect.store",
    "geffect.report",
    "geffect.costs",
)
"""Whose names are public."""

MODULES = (
    "geffect.audit.beside",
    "geffect.audit.depth",
    "geffect.audit.prompts",
    "geffect.audit.recognition",
    "geffect.audit.relearning",
    "geffect.audit.rounding",
    "geffect.audit.shares",
    "geffect.data.collate",
    "geffect.data.examples",
    "geffect.data.others",
    "geffect.data.pairs",
    "geffect.evaluation.memorised",
    "geffect.evaluation.privacy",
    "geffect.evaluation.rouge",
    "geffect.gram",
    "geffect.groups",
    "geffect.plots.conventions",
    "geffect.plots.paper",
    "geffect.scores",
    "geffect.sketch",
    "geffect.sources",
)
"""Modules that the guide names; their public names are those that they define."""


TYPES = "types"
"""The page of what signatures name and no `__all__` lists."""

TYPED = "What functions take and return."


def names_in(module: ModuleType) -> list[str]:
    """The public names of a module, without other modules."""
    listed = getattr(module, "__all__", None) or [
        name
        for name, found in vars(module).items()
        if getattr(found, "__module__", None) == module.__name__
    ]
    modules = {name for name, found in vars(module).items() if isinstance(found, ModuleType)}
    rooms = {room.removeprefix(f"{module.__name__}.") for room in ROOMS}
    return [name for name in listed if name[0] != "_" and name not in modules | rooms]


def homes() -> dict[str, list[str]]:
    """The full names that each page documents: everything on the first page that has it."""
    pages: dict[str, list[str]] = {}
    seen: set[int] = set()
    for page in (*ROOMS, *MODULES):
        module = importlib.import_module(page)
        pages[page] = []
        for name in names_in(module):
            thing = getattr(module, name)
            if not (hasattr(thing, "__name__") and id(thing) in seen):
                seen.add(id(thing))
                pages[page].append(f"{page}.{name}")
    pages[TYPES] = sorted(
        f"{thing.__module__}.{thing.__qualname__}"
        for thing in mentioned([at(name) for names in pages.values() for name in names])
    )
    return pages


def at(name: str) -> Any:
    """What has this full name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def mentioned(things: Iterable[Any]) -> list[type]:
    """The classes of the package that are not among the things, but in their signatures."""
    known = [*things]
    found: dict[int, type] = {}
    for thing in known:
        for other in classes_in(thing):
            if not any(other is one for one in known) and other.__name__[0] != "_":
                found[id(other)] = other
                known.append(other)  # whose own signature is read in turn
    return [*found.values()]


def classes_in(thing: Any) -> Iterator[type]:
    """The classes of the package that a thing is made of and that its signatures name."""
    called = [thing]
    if isinstance(thing, type):
        yield from (base for base in thing.__bases__ if base.__module__.startswith("geffect"))
        members = [found for name, found in vars(thing).items() if name[0] != "_"]
        called += [thing.__init__, *(getattr(one, "fget", None) or one for one in members)]
    for one in map(inspect.unwrap, filter(callable, called)):
        try:
            hints = typing.get_type_hints(one)
        except (NameError, TypeError):
            continue
        for hint in hints.values():
            yield from inside(hint)


def inside(hint: Any) -> Iterator[type]:
    """The classes of the package in an annotation."""
    for part in (typing.get_origin(hint), *typing.get_args(hint)):
        yield from inside(part) if part is not None and part is not hint else ()
    if isinstance(hint, list):
        yield from (found for part in hint for found in inside(part))
    if isinstance(hint, type) and hint.__module__.startswith("geffect"):
        yield hint


def links(pages: dict[str, list[str]]) -> dict[str, str]:
    """From every full name of a public thing to the one under which it is documented."""
    found: dict[str, str] = {}
    documented: dict[int, str] = {}
    for name in (name for names in pages.values() for name in names):
        thing = at(name)
        found[name] = documented[id(thing)] = name
        if hasattr(thing, "__qualname__"):
            found.setdefault(f"{thing.__module__}.{thing.__qualname__}", name)
    for page in (*ROOMS, *MODULES):
        module = importlib.import_module(page)
        for name in names_in(module):
            full = f"{page}.{name}"
            found.setdefault(full, documented.get(id(getattr(module, name)), full))
    return found


def page(name: str, here: list[str], known: dict[str, str]) -> str:
    """A page: what the room is, its names in a table, and each with its docstring."""
    if name == TYPES:
        rows, lines = (
            here,
            ["Types in signatures", "=" * 19, "", TYPED, ""],
        )
    else:
        module = importlib.import_module(name)
        rows = [known[f"{name}.{item}"] for item in names_in(module)]
        lines = [name, "=" * len(name), "", f".. automodule:: {name}", "   :no-members:"]
        # A function may have the name of its module.
        lines += ["   :no-index:", ""] if name in known else [""]
    lines += [".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {row.removeprefix(f'{name}.') if row in here else '~' + row}" for row in rows]
    for full in here:
        lines += ["", f".. auto{kind(at(full))}:: {full}"]
    return "\n".join([*lines, ""])


def contents() -> str:
    """The page that leads to the others, and says what each is of."""
    lines = ["API reference", "=" * 13, "", "Every public name, by the package that has it.", ""]
    captions = {"Packages": ROOMS, "Modules inside of them": MODULES, "Beside them": (TYPES,)}
    for caption, pages in captions.items():
        lines += [caption, "-" * len(caption), ""]
        lines += [".. toctree::", "   :hidden:", f"   :caption: {caption}", ""]
        lines += [*(f"   {name}" for name in pages), ""]
        lines += [f":doc:`{name}`\n   {purpose(name)}\n" for name in pages]
    return "\n".join(lines)


def purpose(name: str) -> str:
    """What a module says of itself in its first paragraph, as reStructuredText."""
    if name == TYPES:
        return TYPED
    told = str(importlib.import_module(name).__doc__).split("\n\n")[0]
    return re.sub(r"`+([^`]+)`+", r"``\1``", " ".join(told.split()))


def kind(thing: object) -> str:
    """What autodoc calls it."""
    if isinstance(thing, type):
        return "exception" if issubclass(thing, BaseException) else "class"
    # A rule is an object, with the name, the words and the arguments of a function.
    return "function" if hasattr(inspect.unwrap(thing), "__code__") else "data"


def write(app: Any) -> None:
    """Write the pages into the source, before it is read."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = homes()
    app.env.geffect_names = known = links(pages)
    for name, here in pages.items():
        (folder / f"{name}.rst").write_text(page(name, here, known), encoding="utf-8")
    (folder / "index.rst").write_text(contents(), encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Have the pages written as a build begins."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
