"""Capture: from the losses of a training step to the row of a run file."""

from .keep import Keep
from .recorder import Recorder
from .schedule import at, every, logspaced

__all__ = ["Keep", "Recorder", "at", "every", "logspaced"]
