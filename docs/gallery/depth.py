"""
Depth: where the answer still is
================================

How much less likely the original finds its answer when the output of a block is that of another
model. Where the line runs like that of the original, the answer is still there.
"""

import pandas as pd

from geffect.plots import depth

depth(pd.read_csv("depth.csv"))
