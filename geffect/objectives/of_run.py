"""What an objective has of one run beside its options: a random target, a dual variable."""

from collections.abc import Mapping
from typing import Any

import numpy as np


class OfRun:
    """One thing of that kind. What is empty here is what it does not have.

    `Objective.begin` makes it and `Objective.of_run` names it. Who runs the objective hands the
    table and the values to the file, tells it of every step of the optimizer, and saves it with
    checkpoints.
    """

    @property
    def table(self) -> Mapping[str, np.ndarray]:
        """What a run file keeps of it as a whole: columns by name."""
        return {}

    @property
    def values(self) -> Mapping[str, float]:
        """What a run file is told of each step: numbers by name, as its loss has them."""
        return {}

    def advance(self) -> None:
        """The optimizer has taken a step."""

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that."""
