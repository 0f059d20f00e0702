"""
Evaluations: a metric over what the run predicts
================================================

Each metric of a checkpoint over the change of either risk that the gradients predict up to
there. A line that is straight says that first-order effects explain the metric.
"""

from geffect import open_run
from geffect.analysis import join, read_evaluations
from geffect.plots import evaluations

metrics = read_evaluations([f"{step}=ga-{step}.json" for step in range(4, 21, 4)])
evaluations(join(open_run("ga.h5"), metrics))
