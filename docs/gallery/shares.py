"""
Shares: how much comes back
===========================

The recoverable share of each attack: 0 for what a model shows that never knew, 1 for the
original.
"""

import pandas as pd

from geffect.plots import shares

recovered = pd.read_csv("recovered.csv").rename(columns={"attack": "label"})
shares(recovered, lines={"hidden": 0.15})
