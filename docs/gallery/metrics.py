"""
Metrics: a table of runs and what was measured
==============================================

A row for each setting, a column for each metric.
"""

import pandas as pd

from geffect.plots import metrics

curves = pd.read_csv("curves.csv")
ends = curves[curves["step"] == curves["step"].max()]
ends = ends.assign(setting=ends["method"] + ", " + ends["variant"])
measured = {"forget_nll": "forget NLL", "retain_nll": "retain NLL", "unseen_nll": "unseen NLL"}
table = ends.rename(columns=measured).melt("setting", [*measured.values()], "metric")
metrics(table)
