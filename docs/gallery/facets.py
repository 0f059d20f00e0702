"""
Facets: a panel for each run or effect
======================================

Any plot, once for each name in a column, all on one scale.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import facets, heatmap
from geffect.scores import stack

retaining = {}
for name in ("ga", "npo"):
    effects = g_effect(open_run(f"{name}.h5"), by="layer")
    retaining[name] = effects[effects["effect"] == "retaining"]
facets(stack(retaining, "run"), heatmap, "run")
