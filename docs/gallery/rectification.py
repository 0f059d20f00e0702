"""
Rectification: what a rectifier did
===================================

The cosine with the retain average before and after, the steps in which the rectifier fired, and
those in which the applied update opposes the average all the same. Under AdamW, GRU on the
gradient keeps its promise for the gradient alone.
"""

from geffect import open_run
from geffect.analysis import rectification as rectified
from geffect.plots import rectification

rectification(rectified(open_run("ga-gru.h5")))

# %%
# In update space the promise holds for the step that is taken:

rectification(rectified(open_run("ga-gru-update.h5")))
