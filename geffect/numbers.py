"""What counts as a number where an option or a weight is one; numbers in JSON and in words."""

import json
import re
import sys
from collections.abc import Mapping
from math import inf, isfinite
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an int or a float, finite, and not one of True and False.

    >>> [is_number(value) for value in (2, 0.5, True, "2", float("nan"), 10**400)]
    [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def is_whole(value: object, least: float = -inf) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`, and not one of True and False.

    >>> [is_whole(value, 1) for value in (2, 0, 2.0, True, "2")]
    [True, False, False, False, False]
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def counted(count: int, thing: str) -> str:
    """So many of a thing, in words.

    >>> counted(1, "step"), counted(3, "step")
    ('1 step', '3 steps')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"


def percent(share: float, form: str = ".0f") -> str:
    """A share in per cent, as it is written everywhere.

    >>> percent(0.927), percent(0.927, ".1f"), percent(0.00064, ".1g")
    ('93 %', '92.7 %', '0.06 %')
    """
    return f"{100 * share:{form}} %"


def percent_of_two(share: float) -> str:
    """A share in per cent of two digits at least, as it is written where it may be small.

    >>> percent_of_two(0.00064), percent_of_two(0.927), percent_of_two(0.996), percent_of_two(12.5)
    ('0.064 %', '93 %', '99.6 %', '1250 %')
    """
    if share < 0.995:
        return percent(share, ".2g")
    return percent(share, ".1f" if share < 1 else ".0f")


def unbroken(text: str) -> str:
    """Text for a page, whose lines do not break between a number and its sign of per cent.

    >>> unbroken("93 % of 7 steps")
    '93\\xa0% of 7 steps'
    """
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text)


def as_json(facts: object, indent: int | None = None) -> str:
    """Facts as JSON, which knows neither NaN nor infinity: null stands for them.

    >>> as_json({"low": float("nan"), "value": 0.1})
    '{"low": null, "value": 0.1}'
    """
    return json.dumps(finite(facts), indent=indent, allow_nan=False)


def finite(facts: object) -> object:
    """Facts with None in the place of each NaN and infinity.

    >>> finite({"low": float("nan"), "values": (0.1, float("inf"))})
    {'low': None, 'values': [0.1, None]}
    """
    if isinstance(facts, Mapping):
        return {name: finite(value) for name, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [*map(finite, facts)]
    return None if isinstance(facts, float) and not isfinite(facts) else facts
