"""Who hears of a gradient before it is rectified."""

from typing import Protocol
from weakref import WeakSet

from geffect.gradients import Gradients, GradientTransform


class Listener(Protocol):
    """Somebody who looks at `.grad` later on, and is to know what it was made from."""

    def hear(self, rectifier: GradientTransform, gradients: Gradients) -> None:
        """The rectifier is about to leave these gradients in `.grad`, rectified."""


listeners: WeakSet[Listener] = WeakSet()
"""All that hear of every rectifier, for as long as they are in here."""


def tell(rectifier: GradientTransform, gradients: Gradients) -> None:
    """Tell all listeners."""
    for listener in tuple(listeners):
        listener.hear(rectifier, gradients)
