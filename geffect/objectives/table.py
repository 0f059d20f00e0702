"""The page of the documentation that lists the catalogue: `python -m geffect.objectives.table`."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from .base import Objective
from .catalogue import CATALOGUE, REGULARISERS
from .options import options_of

HEAD = """\
# Objectives

By name on the command line (`geffect replay --objective npo --beta 0.5`,
`geffect demo --methods npo`), in `UnlearningTrainer(objective="npo")`, or as a class of
`geffect.objectives`. An option is a field of the class: `--beta 0.5`,
`--objective-option beta=0.5`, `NPO(beta=0.5)`. All are minimised. Weights of risks, such as
`{"forget": -1.0, "retain": 1.0}`, are an objective too.

A regulariser goes with any of them that has none: `npo+kl` is NPO plus `weight` times KL, in Python
`Regularised(NPO(), KL(), weight=20.0)`, on the command line `--objective npo+kl --weight 20`.

The reference is the model before unlearning. The reduction says how each part of the loss is taken
from tokens: `token_mean` over all of them, `sample_mean` over the means of samples, `sequence_sum`
over their sums.

This page is written by `python -m geffect.objectives.table > docs/objectives.md`.
"""

COLUMNS = ("name", "class", "loss", "reduction", "options", "reference", "sides", "source")


def page() -> str:
    """The page, with a row for each name."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_row(name, objective) for name, objective in CATALOGUE.items()]
    rows += [
        _row(f"+{name}", added.regulariser, {"weight": added.weight})
        for name, added in REGULARISERS.items()
    ]
    return "\n".join([HEAD, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _row(
    name: str, objective: Objective, further: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    summary = (inspect.getdoc(type(objective)) or "").splitlines()[0]
    of_row = {**(further or {}), **options_of(objective)}
    options = [f"`{option}` {value}" for option, value in of_row.items()]
    return (
        f"`{name}`",
        f"`{objective!r}`",
        summary.replace("|", r"\|"),
        ", ".join(f"{r.kind} of {r.side}" for r in objective.reductions.values()),
        ", ".join(options) or "none",
        objective.reference,
        ", ".join(objective.sides),
        objective.source,
    )


if __name__ == "__main__":
    sys.stdout.write(page())
