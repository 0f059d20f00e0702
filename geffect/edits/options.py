"""What the options of edits may be."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def is_count(value: object) -> bool:
    """Whether it is a whole number from 1 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_option(owner: object, name: str, holds: bool, should: str) -> None:
    """Refuse an option that is not what it should be.

    >>> from geffect.edits import SSD
    >>> SSD(alpha=-1.0)
    Traceback (most recent call last):
    ValueError: `alpha` of SSD should be positive. Found `alpha = -1.0`. Pass another value.
    """
    if not holds:
        raise ValueError(
            f"`{name}` of {type(owner).__name__} should be {should}. Found "
            f"`{name} = {getattr(owner, name)!r}`. Pass another value."
        )


def patterns(text: str) -> Sequence[str]:
    """Patterns of names that stand in one text, with commas between them.

    >>> patterns("*.mlp.*, lm_head.weight")
    ['*.mlp.*', 'lm_head.weight']
    """
    return [word for word in (part.strip() for part in text.split(",")) if word]


def matching(names: Iterable[str], text: str) -> list[str]:
    """The names that one of the patterns in a text is of, in their order.

    >>> matching(["mlp.weight", "head"], "*.weight, x")
    ['mlp.weight']
    """
    return [name for name in names if any(fnmatchcase(name, one) for one in patterns(text))]
