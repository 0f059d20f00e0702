"""
Crossings: many methods at one level of forgetting
==================================================

A panel for each variant, a line a method, to where it reaches the level.
"""

import numpy as np
import pandas as pd

from geffect.plots import crossings

LEVEL = 1.0  # nats per token; in a study the forget loss of a model that never saw the data

curves = pd.read_csv("curves.csv")
ends = []
for _, run in curves.groupby(["method", "variant"], sort=False):
    before = run[(run["forget_nll"] >= LEVEL).cumsum() == 0].assign(at_level=False)
    ends.append(before)
    if len(before) < len(run):  # between these two steps it reaches the level
        around = run.iloc[len(before) - 1 : len(before) + 1]
        kept = np.interp(LEVEL, around["forget_nll"], around["retain_nll"])
        end = around.tail(1).assign(forget_nll=LEVEL, retain_nll=kept, at_level=True)
        ends.append(end)
crossings(pd.concat(ends), "variant", "retain_nll", level=LEVEL, label="retain NLL")
