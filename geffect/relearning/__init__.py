"""Parameters that have relearned for a moment: where an objective's gradient may be taken.

A gradient at theta pushes down what the model says there, and may hide facts that a few steps of
training bring back. One that is taken a little way down the loss of these facts pushes down what
would come back. Everything else of a step stays at theta.
"""

from .at_copy import Copy, check_can_relearn, relearned
from .of_step import Relearned, check_relearned, tell_unbounded

__all__ = [
    "Copy",
    "Relearned",
    "check_can_relearn",
    "check_relearned",
    "relearned",
    "tell_unbounded",
]
