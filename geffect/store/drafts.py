"""Drafts: files that are made whole beside the place that they are to take."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .outside import is_plain

TOKEN = 16
"""How many letters nobody can foresee the name of a draft has."""

LONGER = len(f"..{'x' * TOKEN}.draft")
"""By how many bytes the name of a draft is longer than that of the file."""


@contextmanager
def draft_of(place: Path) -> Iterator[Path]:
    """An empty file beside the place, under a name that nobody else has; it is gone afterwards.

    Move it into the place to keep it.
    """
    draft = place.with_name(f".{place.name}.{secrets.token_hex(TOKEN // 2)}.draft")
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(place: Path) -> None:
    """Remove what killed writers left half made of the file that is to be there."""
    # Older writers had the number of their process in the place of the token.
    own = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]+\.draft")
    for file in place.parent.iterdir():
        if own.fullmatch(file.name) and is_plain(file):
            file.unlink(missing_ok=True)
