"""The name that was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def meant(found: str, names: Iterable[str]) -> str:
    """A question that names what is nearest to a misspelt name; empty where nothing is near.

    >>> meant("retian", ["forget", "retain"]), meant("moon", ["forget", "retain"])
    (' Did you mean `retain`?', '')
    """
    near = get_close_matches(found.lower(), list(names), n=1, cutoff=0.7)
    return f" Did you mean `{near[0]}`?" if near else ""
