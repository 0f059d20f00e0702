"""
Text: which tokens of an answer matter
======================================

Every token of an answer on the colour of its effect.
"""

import pandas as pd

from geffect.plots import text

tokens = pd.read_csv("tokens.csv", keep_default_na=False)
text(tokens[(tokens["sample"] == 0) & (tokens["risk"] == "forget")])
