"""The names of the gradients that a run holds; every other name is a further risk."""

OBJECTIVE = "objective"
"""What unlearning minimises; its parts, where they are recorded, are "objective.<part>"."""

FORGET, RETAIN = "forget", "retain"
"""The risks on the data that should go and on the data that should stay."""

RETAIN_EMA = "retain_ema"
"""The running average of the retain gradient that a rectifier protects."""

UPDATE = "update"
"""Not a gradient: theta after minus theta before, as the optimizer did it."""


def is_risk(source: str) -> bool:
    """Whether a source is the gradient of a risk.

    >>> [name for name in ("objective.forget", "retain", "fact_17", "update") if is_risk(name)]
    ['retain', 'fact_17']
    """
    return source.partition(".")[0] != OBJECTIVE and source not in (RETAIN_EMA, UPDATE)
