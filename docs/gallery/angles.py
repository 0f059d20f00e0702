"""
Angles: every gradient with every other
=======================================

The cosine of every two sources of a run, and the length of each; the median over the steps.
"""

from geffect import open_run
from geffect.analysis import angles as cosines
from geffect.plots import angles

angles(cosines(open_run("npo.h5"), by="model"))
