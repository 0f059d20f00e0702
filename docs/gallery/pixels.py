"""
Pixels: a figure for what shows images
======================================

Trackers such as TensorBoard take an image as an array: rows, columns and three colours.
"""

from geffect import open_run
from geffect.analysis import g_effect
from geffect.plots import pixels, sheet

figure = sheet(g_effect(open_run("ga.h5"), by="layer"))
image = pixels(figure, dpi=50)  # UInt8[row, column, colour]
figure
