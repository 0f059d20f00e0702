"""What a rectifier says of steps that are not as they should be, once."""

import warnings


class Notices:
    """How many steps were skipped; the first is warned of.

    >>> notices = Notices()
    >>> with warnings.catch_warnings(record=True) as said:
    ...     notices.skip("the retain gradient is zero")
    ...     notices.skip("the retain gradient is zero")
    >>> notices.skipped, len(said)
    (2, 1)
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._told_unmet = False

    def unmet(self, what: str) -> None:
        """Say, once, that a step is not what its rule promises."""
        if not self._told_unmet:
            warnings.warn(
                f"A step is not what its rule promises. {what}. Such steps are marked `unmet` in "
                "the report and in the run file; this is said once.",
                stacklevel=6,
            )
        self._told_unmet = True

    def skip(self, reason: str) -> None:
        """Count a step that was not rectified."""
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=6,
            )
        self.skipped += 1
