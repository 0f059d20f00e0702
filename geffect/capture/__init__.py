"""Capture: from the losses of a training step to the row of a run file."""

from .clauses import Stop
from .recorder import Recorder
from .schedule import at, every, logspaced
from .stopping import StopWhen
from .store_options import StoreOptions

__all__ = ["Recorder", "Stop", "StopWhen", "StoreOptions", "at", "every", "logspaced"]
