"""What a rectifier did since the last log, in numbers for the log of a Trainer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from geffect.gradients import Rectification

PREFIX = "rectify/"


class RectificationLog:
    """The means of the reports of a rectifier over the steps since they were last asked for.

    Of the whole model: inner products and squared norms are summed over the blocks of a report,
    `fired` and `unmet` are shares of the blocks and `coefficient` is their mean. `removed` is
    1 - |x|^2 / |u|^2, the share of the energy of u that was taken away; `selected` is the share of
    coordinates that a mask keeps, and `overlap` its Jaccard overlap with the one before. Against
    several retain sets, each has its own numbers, under its name: `rectify/cosine_before_world`.
    What no step had a number for, such as the applied update where it is not followed, is left out.

    >>> unknown = (math.nan,)
    >>> log = RectificationLog()
    >>> log.take(Rectification(("model",), fired=(1.0,), coefficient=(0.5,), inner_before=(-3.0,),
    ...     inner_after=(0.0,), norm_before=(5.0,), norm_after=(4.0,), retain_norm=(1.0,),
    ...     applied_average=unknown, applied_fresh=unknown, unmet=(0.0,), among=unknown,
    ...     selected=unknown, selected_again=unknown, selected_either=unknown))
    >>> {name: round(value, 2) for name, value in log.means().items() if name != "rectify/fired"}
    {'rectify/coefficient': 0.5, 'rectify/cosine_before': -0.6, 'rectify/cosine_after': 0.0, ...}
    >>> log.means()
    {}
    """

    def __init__(self) -> None:
        self._numbers: dict[str, list[float]] = {}
        self._taken: Rectification | None = None

    def take(self, report: Rectification | None) -> None:
        """Take in the report of a step; one that was taken in before counts once."""
        if report is None or report is self._taken:
            return
        self._taken = report
        for name, value in _of_model(report):
            if not math.isnan(value):
                self._numbers.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """The means since the last time, by the names under which they are logged."""
        numbers, self._numbers = self._numbers, {}
        return {PREFIX + name: math.fsum(values) / len(values) for name, values in numbers.items()}


def _of_model(report: Rectification) -> Iterator[tuple[str, float]]:
    """The numbers of the whole model, by name; those of several retain sets one after the other."""
    sets: dict[str, list[int]] = {}
    for index, block in enumerate(report.blocks):
        sets.setdefault(block.partition(", ")[2], []).append(index)
    for name, indices in sets.items():
        of_set = {
            field.name: [getattr(report, field.name)[index] for index in indices]
            for field in fields(report)
            if field.name != "blocks"
        }
        for number, value in _numbers(of_set):
            yield f"{number}_{name}" if name else number, value


def _numbers(blocks: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, float]]:
    before, after, retain = (
        math.hypot(*blocks[norm]) for norm in ("norm_before", "norm_after", "retain_norm")
    )
    yield "fired", _mean(blocks["fired"])
    yield "coefficient", _mean(blocks["coefficient"])
    yield "cosine_before", _ratio(math.fsum(blocks["inner_before"]), before * retain)
    yield "cosine_after", _ratio(math.fsum(blocks["inner_after"]), after * retain)
    yield "removed", 1 - _ratio(after**2, before**2)
    yield "retain_norm", retain
    yield "applied_average", math.fsum(blocks["applied_average"])
    yield "applied_fresh", math.fsum(blocks["applied_fresh"])
    yield "unmet", _mean(blocks["unmet"])
    yield "selected", _ratio(math.fsum(blocks["selected"]), math.fsum(blocks["among"]))
    yield (
        "overlap",
        _ratio(math.fsum(blocks["selected_again"]), math.fsum(blocks["selected_either"])),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
