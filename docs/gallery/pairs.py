"""
Pairs: how alike requests are
=============================

The cosine of what two requests to forget did to the parameters, and the overlap of what they
moved most.
"""

from geffect import open_run
from geffect.analysis import task_vectors
from geffect.plots import pairs

vectors = task_vectors(open_run("requests.h5"))
pairs(vectors[vectors["quantity"] == "cosine"])
