"""
Norm ratio: which gradient is the longer one
============================================

The length of the objective gradient over that of the retain gradient, on a logarithmic scale.
Of a run that tells how far gradients were clipped there is a second panel.
"""

from geffect import open_run
from geffect.analysis import norm_ratio as ratios
from geffect.plots import norm_ratio

norm_ratio(ratios(open_run("ga.h5")))
