"""The names of the gradients that a run holds; every other name is a further risk."""

from collections.abc import Collection, Iterable

from .near import is_slip

OBJECTIVE = "objective"
"""What unlearning minimises; its parts, where they are recorded, are "objective.<part>"."""

FORGET, RETAIN = "forget", "retain"
"""The risks on the data that should go and on the data that should stay."""

RETAIN_EMA = "retain_ema"
"""The running average of the retain gradient that a rectifier protects."""

AVERAGE = "_ema"
"""How the name of a running average ends."""

RECTIFIED = "rectified"
"""The gradient that a rectifier made of the objective's, as it is handed to the optimizer."""

UPDATE = "update"
"""Not a gradient: theta after minus theta before, as the optimizer did it."""


def average_of(source: str) -> str:
    """The name of the running average of a gradient.

    >>> average_of("world")
    'world_ema'
    """
    return source + AVERAGE


def is_risk(source: str) -> bool:
    """Whether a source is the gradient of a risk.

    >>> [name for name in ("objective", "retain", "rectified", "update") if is_risk(name)]
    ['retain']
    """
    return source.partition(".")[0] != OBJECTIVE and not is_reserved(source)


def is_reserved(source: str) -> bool:
    """Whether the name is one that no loss can have.

    >>> is_reserved("retain_ema"), is_reserved("rectified"), is_reserved("retain")
    (True, True, False)
    """
    return source in (RECTIFIED, UPDATE) or source.endswith(AVERAGE)


def check_risks(argument: str, names: Iterable[str], *, taken: Collection[str] = ()) -> None:
    """Refuse names for risks that are misspelt, those of other gradients, or no names in a file.

    >>> check_risks("risks", ["fact_17"], taken=["forget", "retain"])
    >>> check_risks("risks", ["objective.forget"])
    Traceback (most recent call last):
    ValueError: `risks` should have names ... Found 'objective.forget'. Choose another name.
    """
    names = list(names)
    wrong = [
        repr(name)
        for name in names
        if not isinstance(name, str)
        or not name.strip(".")
        or "/" in name
        or name in taken
        or not is_risk(name)
    ]
    if wrong:
        others = ", ".join(f"`{name}`" for name in (*taken, RECTIFIED, UPDATE))
        raise ValueError(
            f"`{argument}` should have names of their own: words without a slash, none of "
            f"{others}, nor one that begins with `{OBJECTIVE}` or ends in `{AVERAGE}`. Found "
            f"{', '.join(wrong)}. Choose another name."
        )
    check_spelt(f"`{argument}`", names)


def check_spelt(whose: str, names: Iterable[str]) -> None:
    """Refuse a name that is probably one of the two risks, misspelt.

    >>> check_spelt("The losses", ["objective", "forgte"])
    Traceback (most recent call last):
    ValueError: The losses should ... Found `forgte`. Did you mean `forget`? ...
    """
    for name, meant in ((n, m) for n in names for m in (FORGET, RETAIN) if is_slip(n, m)):
        raise ValueError(
            f"{whose} should have names that differ from `{meant}` by more than a slip. Found "
            f"`{name}`. Did you mean `{meant}`? Choose another name if not."
        )
