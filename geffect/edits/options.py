"""What the options of edits may be."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def check_option(
    owner: object, name: str, holds: bool, should: str, do: str = "Pass another value."
) -> None:
    """Refuse an option that is not what it should be; `do` is what to do then.

    >>> from geffect.edits import SSD
    >>> SSD(alpha=-1.0)
    Traceback (most recent call last):
    ValueError: `alpha` of SSD should be positive. Found `alpha = -1.0`. Pass another value.
    """
    if not holds:
        raise ValueError(
            f"`{name}` of {type(owner).__name__} should be {should}. Found "
            f"`{name} = {getattr(owner, name)!r}`. {do}"
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


def chosen(owner: object, names: Iterable[str]) -> list[str]:
    """The names that `include` of an edit has a pattern of, and `exclude` has none.

    Raises ValueError for a pattern that no name has, and where nothing is left.

    >>> from geffect.edits import SSD
    >>> chosen(SSD(include="*mlp*", exclude="*bias"), ["mlp.weight", "mlp.bias", "head.weight"])
    ['mlp.weight']
    """
    every, kind = list(names), type(owner).__name__
    texts = {option: getattr(owner, option) for option in ("include", "exclude")}
    for option, text in texts.items():
        for pattern in patterns(text):
            if not matching(every, pattern):
                raise ValueError(
                    f"`{option}` of {kind} should have patterns of names of parameters. Found "
                    f"`{pattern}`, which none of them has, such as `{every[0]}`. Mend it, or leave "
                    "it out."
                )
    excluded = matching(every, texts["exclude"])
    found = [name for name in matching(every, texts["include"]) if name not in excluded]
    if not found:
        raise ValueError(
            f"`include` and `exclude` of {kind} should leave parameters to select from. Found "
            f"none: {texts['include']!r} without {texts['exclude']!r}. Exclude less."
        )
    return found
