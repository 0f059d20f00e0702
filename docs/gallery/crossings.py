"""
Crossings: many methods at one level of forgetting
==================================================

A panel for each variant, a line a method, to where it reaches the level.
"""

import pandas as pd

from geffect.plots import crossings

LEVEL = 1.0  # nats per token; in a study the forget loss of a model that never saw the data

curves = pd.read_csv("curves.csv")
run = [curves["method"], curves["variant"]]
first = curves["step"].where(curves["forget_nll"] >= LEVEL).groupby(run).transform("min")
table = curves.assign(at_level=curves["step"] == first)[~(curves["step"] > first)]
crossings(table, "variant", "retain_nll", level=LEVEL, label="retain NLL (nats per token)")
