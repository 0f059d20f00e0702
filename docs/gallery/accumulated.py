"""
Accumulated: what was predicted, and what happened
==================================================

The rise of each risk as the updates predict it, to first order, and as it was measured. Where
points leave their line, first-order scores say little.
"""

from geffect import open_run
from geffect.analysis import accumulated as summed
from geffect.plots import accumulated

accumulated(summed(open_run("ga-gru.h5")))
