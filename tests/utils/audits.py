"""What tests of audits share: small budgets, and items of random tokens."""

from dataclasses import replace

import torch

from geffect.audit.budget import QUICK, Budget
from geffect.audit.relearning import RelearningBudget

from . import tiny

SHORT = RelearningBudget(steps=(1, 2), rates=(1.0,), seeds=(0,), sources=("benign",))
BUDGET = Budget("short", SHORT, taught=(1,), kept=3, said=2, samples=0, layers=True)
"""For models that know nothing: whether it runs."""

OF_CONTROLS = replace(
    QUICK,
    relearning=RelearningBudget(steps=(48,), rates=(1.0,), seeds=(0,), sources=("benign",)),
    kept=12,
    said=4,
    layers=False,
)
"""For models of the quick study: what tells their controls apart."""


def items(seed: int, count: int = 6) -> list[dict[str, list[int]]]:
    """Random rows of eight tokens, whose latter half is scored."""
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, tiny.VOCABULARY, (count, 8), generator=drawn).tolist()
    return [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in rows]
