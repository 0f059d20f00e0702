"""What killed writers left half made."""

import re
from pathlib import Path

from .outside import is_plain


def remove_drafts(place: Path) -> None:
    """Remove what killed writers left half made of the file that is to be there."""
    # Older writers had the number of their process in the place of the token.
    own = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]+\.draft")
    for file in place.parent.iterdir():
        if own.fullmatch(file.name) and is_plain(file):
            file.unlink(missing_ok=True)
