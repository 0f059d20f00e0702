"""Which facts an attack brought back, one by one."""

import numpy as np
import pandas as pd

from .attacks import HIDDEN, baseline
from .models import ORIGINAL, UNLEARNED
from .sets import FORGET
from .summary import Values
from .verdict import TOLD_APART

BACK = 0.5
"""A fact with a larger share is nearer to the original than to a model that never knew."""


def shares_of_facts(items: pd.DataFrame, attack: str) -> pd.DataFrame:
    """The recoverable share of each fact to forget under one attack, the largest first.

    - `items`: the values of items, as `AuditReport.items` has them.
    - `attack`: one that is held against the original, such as "rounding to int4".

    Columns: item, subject, before and after (of the unlearned model), floor (of the retrained model
    after the same attack; without one the mean of the original after it on the holdout), original
    (not attacked) and share:

        share = (after - floor) / (original - floor)

    Facts of which the original shows no more than the floor are left out: of these nothing can be
    told. Raises ValueError for an attack that was not made, or is told and not judged.

    >>> from geffect.audit.table import per_item
    >>> int4, nll = ("hidden", "rounding to int4", "forget"), ("memorised", "nll", "forget")
    >>> rows = [(*int4, "unlearned", [1.0]), (*int4, "retrained", [4.0]),
    ...         (*nll, "unlearned", [4.0]), (*nll, "original", [0.0])]
    >>> items = pd.concat([per_item(*row, ["Ada"]) for row in rows])
    >>> shares_of_facts(items, "rounding to int4")[["before", "after", "share"]].values.tolist()
    [[4.0, 1.0, 0.75]]
    """
    beside, values = baseline(attack), Values.of(items)
    floor, after = values.floor(HIDDEN, attack), values.get(HIDDEN, attack, FORGET, UNLEARNED)
    if beside is None or floor is None or after is None:
        raise ValueError(
            f"`attack` should be one of the recoverable shares of the report's table. Found "
            f"{attack!r}. Take it from there."
        )
    never = np.asarray(floor.values, np.float64)
    asked = (items["battery"] == HIDDEN) & (items["metric"] == attack) & (items["set"] == FORGET)
    own = items.loc[asked & (items["model"] == UNLEARNED), ["item", "subject"]]
    facts = own.assign(
        before=values.get(beside.battery, beside.metric, FORGET, UNLEARNED),
        after=after,
        floor=np.nanmean(never) if floor.estimated else never,
        original=values.get(beside.battery, beside.metric, FORGET, ORIGINAL),
    )
    known = facts["original"] - facts["floor"]
    facts["share"] = (facts["after"] - facts["floor"]) / known
    told = facts[(known if beside.rises else -known) >= TOLD_APART].dropna()
    return told.sort_values("share", ascending=False, kind="stable", ignore_index=True)
