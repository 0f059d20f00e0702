"""What counts as a number where an option or a weight is one."""

import sys


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, finite, and not one of True and False.

    >>> [is_number(value) for value in (2, 0.5, True, "2", float("nan"), 10**400)]
    [True, True, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
