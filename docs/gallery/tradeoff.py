"""
Trade-off: what forgetting costs
================================

A point is a step. Runs forget at different speeds, so compare them where they have forgotten
equally much: the lower, the more was kept.
"""

import pandas as pd

from geffect.plots import tradeoff

curves = pd.read_csv("curves.csv")
tradeoff(curves[curves["method"] == "ga"])
