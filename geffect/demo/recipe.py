"""The sizes of the embedded study: corpus, model, training and unlearning steps.

Planning a study needs no torch, so that its workers can load it while nothing else waits.
"""

from dataclasses import dataclass, field

from .corpus import Size

FORGET_BATCH, RETAIN_BATCH = 10, 20
MOST_STEPS = 100
STEPS_BEYOND = 2  # past the level, for the curves
PLAIN_STEPS = 24  # a plain run goes on: what it does after the level belongs into the picture
CURVE_EVERY = 5  # the retain set is large: its NLL is measured at every fifth step

EMA = 0.2
"""Weight of the new retain gradient; the paper's 0.8 measured worse on this small model."""

BETA, ALPHA = 0.1, 1.0
"""Of NPO and of WGA."""


@dataclass(frozen=True)
class Recipe:
    """The size of a model, how it is trained, and how large a corpus it can memorise so."""

    corpus: Size = field(default_factory=Size)
    layers: int = 6
    hidden: int = 96
    heads: int = 4
    epochs: int = 25
    batch: int = 16
    learning_rate: float = 4e-3
    warmup: int = 20


FULL = Recipe()
QUICK = Recipe(
    corpus=Size(authors=8, forget=2, heldout=2, world=20),
    layers=2,
    epochs=17,
    batch=8,
)
