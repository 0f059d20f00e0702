"""
Heatmap: every layer at every step
==================================

Input on top, output at the bottom, time to the right; white is zero. The G-effect of the model
is the sum of those of its layers, so a strong colour is a layer that matters.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import heatmap

effects = g_effect(open_run("ga.h5"), by="layer")
heatmap(effects[effects["effect"] == "retaining"])
