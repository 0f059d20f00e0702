"""
Contours: which samples to unlearn
==================================

The effect of each sample on the retain risk over that on the forget risk. What is worth
unlearning is on the left, and not below zero.
"""

import pandas as pd

from geffect.plots import contours

contours(pd.read_csv("samples.csv"))
