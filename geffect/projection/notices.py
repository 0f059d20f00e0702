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
        self._told: set[str] = set()

    def alone(self, count: int) -> None:
        """Say, once, that optimizers step some of the parameters that are rectified, not all."""
        if count:
            self._say_once(
                "alone",
                "A gradient that is rectified should be stepped in all parameters: what is stepped "
                f"of it may harm where the whole does not. Found {count} parameters with a "
                "gradient that no optimizer stepped. Pass optimizer=optimizer, so that the others "
                "take no part, or freeze them. This is said once.",
            )

    def moved(self, count: int) -> None:
        """Say, once, that something else has moved what a step was to be rectified for."""
        if count:
            self._say_once(
                "moved",
                "In update space the optimizer of the rectifier should take the step, which is "
                f"rectified there. Found that it took none, and that {count} parameters were "
                "written since: what moved them may not have been rectified. Step by that "
                "optimizer. This is said once.",
            )

    def unmet(self, what: str) -> None:
        """Say, once, that a step is not what its rule promises."""
        self._say_once(
            "unmet",
            f"A step is not what its rule promises. {what}. Such steps are marked `unmet` in the "
            "report and in the run file; this is said once.",
        )

    def skip(self, reason: str) -> None:
        """Count a step that was not rectified."""
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=6,
            )
        self.skipped += 1

    def _say_once(self, kind: str, sentence: str) -> None:
        if kind not in self._told:
            warnings.warn(sentence, stacklevel=7)
            self._told.add(kind)
