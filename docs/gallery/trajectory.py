"""
Trajectory: the steps, of the model or of its layers
====================================================

A line for each effect of the model, or for each layer.
"""

from geffect import open_run
from geffect.analysis import cosine, g_effect
from geffect.plots import trajectory

run = open_run("ga.h5")
trajectory(g_effect(run, by="model"))

# %%
# The cosine of two gradients, layer by layer:

trajectory(cosine(run, "forget", "retain", by="layer"))
