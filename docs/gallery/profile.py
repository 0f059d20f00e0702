"""
Profile: the layers, without the time
=====================================

The median over the steps at each depth; the band holds the middle half of them.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import profile

profile(g_effect(open_run("ga.h5"), by="layer"))
