"""
Sheet: one score of a run on one page
=====================================

For each effect every layer at every step, the profile over depth, and the course in time.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import sheet

sheet(g_effect(open_run("ga.h5"), by="layer"))
