"""
Half-spaces: what one step does to either risk
==============================================

The gradients of a step in the plane of the forget and the retain gradient. A step goes against the
gradient of the objective, and the region where that gradient lies says what the step does: in the
grey one it forgets and keeps.
"""

from geffect import open_run
from geffect.analysis import angles
from geffect.plots import half_spaces

cosines = angles(open_run("npo.h5"), by="model")
half_spaces(cosines[cosines["step"] == 4])
