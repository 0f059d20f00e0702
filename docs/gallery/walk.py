"""
Walk: forgetting against damage, step by step
=============================================

The rise of the retain risk over that of the forget risk. Of runs that end at equal forgetting,
the lower one costs less.
"""

from geffect import open_run
from geffect.analysis import accumulated
from geffect.plots import walk
from geffect.scores import stack

runs = {name: accumulated(open_run(f"{name}.h5")) for name in ("ga", "ga-gru-update")}
walk(stack(runs, "run"))
