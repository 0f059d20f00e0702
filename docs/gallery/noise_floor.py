"""
Noise floor: is that cosine more than chance?
=============================================

The cosine of two gradients over the band in which those of noise alone lie. A cosine inside of
the band is no conflict.
"""

from geffect import open_run
from geffect.analysis import noise_floor as over_chance
from geffect.plots import noise_floor

noise_floor(over_chance(open_run("npo.h5"), by="layer"))
