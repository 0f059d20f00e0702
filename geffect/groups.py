"""Groups: the names of what values are summed over, from layers to towers, depths and experts."""

from collections.abc import Callable
from functools import partial

from geffect.layers import DEPTHS, Parameter, in_tower, part_of
from geffect.places import EXPERT, FINAL_NORM, PROJECTOR, expert_of

By = str | Callable[[Parameter], str]
"""What is summed over: one of `LABELS`, or a function from a parameter to the name of its group."""

TENS = ("layers 0-9", "layers 10-19", "layers 20+")


def label_of(by: By) -> Callable[[Parameter], str]:
    """The function that names the group of a parameter.

    "paper" are the thirds of the depth, the final norm with the last, as in arXiv 2502.19301.
    "code" are the layers below 10, from 10 to 19 and from 20 on; as in the public code of the
    paper, the final norm goes with the last of them that there is. "expert" tells experts, routers
    and shared experts from the rest of a layer. Towers have groups of their own.

    >>> norm = Parameter("norm.weight", "final norm", "final norm", -1, "norm", (2,), "float32", (),
    ...                  depth=24)
    >>> [label_of(by)(norm) for by in ("layer", "paper", "code")]
    ['final norm', 'deep', 'layers 20+']
    """
    if callable(by):
        return partial(_named, by)
    if by not in LABELS:
        raise ValueError(
            f"`by` should be one of {', '.join(LABELS)}, or a function from a parameter to the "
            f"name of its group. Found `by = {by!r}`. Choose one of those."
        )
    return LABELS[by]


def label_of_expert(parameter: Parameter, expert: int) -> str:
    """The label of one of the experts that a tensor holds.

    >>> fused = Parameter("h.0.experts.w", "layer 0", "deep", 0, "w", (4, 2, 2), "float32", ())
    >>> label_of_expert(fused, 3)
    'layer 0 expert 3'
    """
    return f"{parameter.layer} {EXPERT} {expert}"


def _named(by: Callable[[Parameter], str], parameter: Parameter) -> str:
    name = by(parameter)
    if name is None or name != name:
        raise ValueError(
            "`by` should return the name of a group for every parameter. Found "
            f"`{name}` for `{parameter.name}`. Return a name for it too, such as 'rest'."
        )
    return name


def _expert(parameter: Parameter) -> str:
    if parameter.role != EXPERT:
        return f"{parameter.layer} {parameter.role}".strip()
    expert = expert_of(parameter.name)
    return label_of_expert(parameter, expert) if expert >= 0 else f"{parameter.layer} experts"


def _third(parameter: Parameter) -> str:
    depth = parameter.group.rpartition(" ")[2]
    if part_of(parameter) == FINAL_NORM:
        depth = DEPTHS[-1]
    return in_tower(depth, parameter.tower) if depth in DEPTHS else parameter.group


def _ten(parameter: Parameter) -> str:
    is_norm = part_of(parameter) == FINAL_NORM
    index = parameter.depth - 1 if is_norm else parameter.index
    if index < 0 or parameter.tower == PROJECTOR:
        return parameter.group
    return in_tower(TENS[min(index // 10, len(TENS) - 1)], parameter.tower)


LABELS: dict[str, Callable[[Parameter], str]] = {
    "parameter": lambda parameter: parameter.name,
    "expert": _expert,
    "layer": lambda parameter: parameter.layer,
    "group": lambda parameter: parameter.group,
    "paper": _third,
    "code": _ten,
    "tower": lambda parameter: parameter.tower,
    "model": lambda parameter: "model",
}
"""What values may be summed over, by name."""
