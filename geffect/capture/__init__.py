"""Capture: from the losses of a training step to the row of a run file."""

from .recorder import Recorder

__all__ = ["Recorder"]
