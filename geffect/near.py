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


def is_slip(found: str, name: str) -> bool:
    """Whether the name was meant, but typed in capitals, with a letter too many or few, or two
    letters swapped. Another letter in the place of one makes another word, such as `remain`.

    >>> [is_slip(found, "retain") for found in ("retian", "Retain", "retan", "remain", "retains")]
    [True, True, True, False, False]
    """
    typed = found.lower()
    swapped = {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    return found != name and (
        typed in {name, *swapped, *_a_letter_less(name)}
        or (name in _a_letter_less(typed) and not typed.startswith(name))
    )


def _a_letter_less(word: str) -> set[str]:
    return {word[:i] + word[i + 1 :] for i in range(len(word))}
