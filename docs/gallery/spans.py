"""
Spans: an answer as HTML
========================

The same as a block of HTML, for a page of your own. A token under the pointer shows its value.
"""

import pandas as pd

from geffect.plots import spans, text

tokens = pd.read_csv("tokens.csv", keep_default_na=False)
html = spans(tokens[(tokens["sample"] == 0) & (tokens["risk"] == "retain")])


class Shown:
    """What a notebook or a page shows as it is."""

    def _repr_html_(self):
        return html


Shown()

# %%
# As a picture this is ``text``:

text(tokens[(tokens["sample"] == 0) & (tokens["risk"] == "retain")])
