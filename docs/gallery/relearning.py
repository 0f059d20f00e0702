"""
Relearning: how soon it is back
===============================

Each model is trained further on what should stay. One that relearns what it should have
forgotten faster than a model that never knew had not forgotten it.
"""

import pandas as pd

from geffect.plots import relearning

relearning(pd.read_csv("relearned.csv"))
