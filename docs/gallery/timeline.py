"""
Timeline: when and where there is conflict
==========================================

Marked are the layers and steps in which objective and retain gradient have a negative inner
product; below, their rate.
"""

from geffect import open_run
from geffect.analysis import conflict
from geffect.plots import timeline

timeline(conflict(open_run("npo.h5"), by="layer"))
