"""
Style: pictures for print
=========================

Inside of ``style`` pictures have the width of a column, a page or a slide, and no text is smaller
than 7 points.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import profile, style

effects = g_effect(open_run("ga.h5"), by="layer")
with style("column"):
    ax = profile(effects)
ax

# %%
# The same for a page of two columns:

with style("page"):
    ax = profile(effects)
ax
