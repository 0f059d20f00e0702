"""A run in which all that others name is hostile to the medium that shows it."""

from pathlib import Path

import numpy as np

from geffect.layers import Parameter
from geffect.store.schema import Contents, Row
from geffect.store.writer import RunWriter

HOSTILE = (
    "[/foo]", "[red]", "\x1b[31mred\x1b[0m", "\x9b31m", "$x^$", r"\frac{", "&amp;", "_private",
    "<script>alert(1)</script>", '" onload="x', "\u202eevil", "\u2066a\u2069", "a\nb", "a|b",
    "a\r\x1b[2Kb", "👩\u200d💻🇩🇪", "語言", "שלום", "`a`", "*a*_b_", "%s", "[a](javascript:b)",
    "{{ 7 }}", "{% x %}", "\u2028", "\ufeff", "\u200b", "\U000e0041", ":warning:", "x" * 2000,
    "a\tb", "</style><b>", "'; DROP", "-->", "$", "$$", "\\$a", "=1+1", "#", "a" + "\u0301" * 9,
)  # fmt: skip
"""Names that a terminal, matplotlib, HTML, jinja, Markdown or a shell would read as its own."""


def hostile_run(path: Path, names: tuple[str, ...] = HOSTILE) -> Path:
    """A run of three steps whose layers, sources and metadata have these names."""
    parameters = [
        Parameter(f"{i}{name}", name, "deep", i, "weight", (2,), "float32", ())
        for i, name in enumerate(names)
    ]
    risks = [name for name in names if "/" not in name][:5]
    sources = ("objective", "forget", "retain", *risks)
    manifest = {
        "format_version": 2,
        "rectifier": None,
        "created": names[0],
        "model": {"class": names[-1], "trainable_numbers": 2},
        "metadata": {name: name for name in names},
        "versions": {name: name for name in names},
        "losses": {name: name for name in names},
        "optimizer": {"class": names[0]},
    }
    writer = RunWriter(path, parameters)
    writer.begin(Contents(sources, manifest))
    rng = np.random.default_rng(0)
    for step in range(3):
        vectors = rng.normal(size=(len(parameters), len(sources), 4))
        writer.append(
            Row(
                step=step,
                losses=np.ones(len(sources)),
                gram=np.einsum("pik,pjk->pij", vectors, vectors),
            )
        )
    writer.close(complete=True)
    return path
