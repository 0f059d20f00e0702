"""What a rectifier says of steps that are not as they should be: each thing once."""

import warnings

from geffect.gradients import Rectification

LOST = 1e-3
"""The cosine that is left where half precision has rounded a correction away."""


class Notices:
    """How many steps were skipped, and which warnings have been given.

    >>> notices = Notices()
    >>> with warnings.catch_warnings(record=True) as said:
    ...     notices.skip("the retain gradient is zero")
    ...     notices.skip("the retain gradient is zero")
    >>> notices.skipped, len(said)
    (2, 1)
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._rounds = False

    def skip(self, reason: str) -> None:
        """Count a step that was not rectified."""
        if self.skipped == 0:
            warnings.warn(
                f"A step was not rectified: {reason}. Rectifier.skipped counts such steps; this "
                "is said once.",
                stacklevel=6,
            )
        self.skipped += 1

    def look_at(self, report: Rectification) -> None:
        """Warn of a step that harms after it was corrected."""
        lost = any(
            product < -LOST * length * retain
            for product, length, retain in zip(
                report.inner_after, report.norm_after, report.retain_norm, strict=True
            )
        )
        if lost and not self._rounds:
            self._rounds = True
            warnings.warn(
                "A step still harms what it should not: its correction is below the rounding of "
                'the parameters. Keep them in float32, or pass scope="coordinate", which is exact '
                "in any type. This is said once.",
                stacklevel=2,
            )
