"""A run in a few words, as a session or a notebook shows it."""

from collections.abc import Mapping
from pathlib import Path

from geffect.text import in_html, plain

from .segments import folder_of


def as_line(name: str, facts: Mapping[str, str]) -> str:
    """The facts of a run on one line.

    >>> as_line("ga", {"state": "complete", "steps": "24, from 0 to 23"})
    '<Run ga: state complete; steps 24, from 0 to 23>'
    """
    return plain(f"<Run {name}: {'; '.join(f'{fact} {words}' for fact, words in facts.items())}>")


def as_html(name: str, facts: Mapping[str, str]) -> str:
    """The facts of a run as a table in HTML. All that a user named is text there.

    >>> as_html("a<b", {"steps": "24"})[:48]
    '<table><caption>Run <b>a&lt;b</b></caption><tr><'
    """
    left = 'style="text-align: left"'
    rows = "".join(
        f"<tr><th {left}>{in_html(fact)}</th><td {left}>{in_html(words)}</td></tr>"
        for fact, words in facts.items()
    )
    return f"<table><caption>Run <b>{in_html(name)}</b></caption>{rows}</table>"


def size_of(path: Path) -> str:
    """How large a run file is, with the gradients beside it."""
    folder = folder_of(path)
    try:
        files = [path, *(folder.iterdir() if folder.is_dir() else ())]
        size = float(sum(file.stat().st_size for file in files))
    except OSError:  # moved or deleted since: looking at a run is no error
        return "gone"
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
