"""The page on costs, from the JSON of the benchmark."""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import traffic
from .bars import Bar

Rows = Sequence[Mapping[str, Any]]

HEAD = """\
# What it costs

Every figure is a ratio within one run: two loads alternate in rounds, a ratio is taken in each
round, and the median counts. The spread is the distance between the quartiles. A figure that is
counted and not timed has one round. The bar is what a figure should not exceed, or not fall
below.
"""

ON_A_GPU = """\
## On a GPU

Measured on one H200 (torch 2.11 with CUDA 13, transformers 5.23; wall time by events, medians of
5). The models are random Llamas with 8 x 256 tokens a side and fused AdamW. The plain step is
the same forward and backward passes and the optimizer. The figures are from before there were
kernels: the recorder and the rectifier walked over all coordinates in the blocks of a CPU's cache,
and each block was a launch. What they launch now is counted by a test, and not timed yet: for each
tensor in float32 a recorder adds 2 launches (two gradients), a rectifier 4 in gradient space, 5 in
update space, 5 in coordinate scope, 4 with `SAGO` and 9 or 10 with `select`. A recorded step and a
rectified one wait for the device 2 times each, however many tensors there are.

What it reads from and writes to memory for that, in numbers for each parameter, is below. The floor
is what is left where nothing is read twice but what has to be: a pass ends where a number of all
coordinates is needed before the next can begin. In bfloat16, gradients and parameters are half as
long, averages are not, and a rectifier takes the products once more, and waits, for each rounding
that it tries.

@TRAFFIC@

| to the plain step | 34M, float32 | 361M, bf16 | 1.24B, bf16 |
|---|---:|---:|---:|
| recorder, two gradients | 1.71 | 3.66 | 9.5 |
| recorder, three gradients | 2.53 | 2.46 | 6.4 |
| recorder, two gradients and the update | 1.89 | 4.59 | 12.7 |
| recorder, two gradients, `store="sketch"` | 2.66 | 4.80 | 8.7 |
| recorder, two gradients, `store="int4"` | 2.57 | 5.62 | |
| recorder, two gradients, `store="bf16"` | 4.06 | 13.5 | |
| rectifier, gradient space | 2.0 | 3.2 | 22 |
| rectifier, update space | 2.0 | 4.3 | 20 |
| rectifier, coordinate scope | 2.7 | 4.4 | 12 |
| rectifier, `select` | 3.2 | 6.5 | 25 |
| rectifier, `SAGO` | 2.3 | 3.7 | |

Memory at peak, 1.24B: 15.6 GiB for the plain step, 17.6 with two gradients, 21.9 with three. The
excess are activations of losses whose graphs are alive together, as those of tensors are; losses
that are functions have one graph at a time.

`python -m tests.bench --device cuda` measures the rows of the first table on the GPU at hand.
`--size 361m` or `--size 1b` measures those of the table above, each beside its bar, the peak of
memory, and what somebody would use instead in the same run: the published procedures of GRU, in
float64 and float32, and of the G-effect, a loop of `torch.autograd.grad` with `torch.dot`, and
torchjd's engine. It writes `runs/bench-cuda.json`, from which `python -m tests.bench.page` makes a
section of this page. `--size small` shows on any machine that it runs.
"""

ON_A_GPU = ON_A_GPU.replace("@TRAFFIC@", traffic.table())

SHORT = {
    "two gradients: recorded step / step": "a recorded step, two gradients, to the step",
    "three gradients: recorded step / same passes": (
        "a recorded step, three gradients, to the same passes"
    ),
    "gradient space: rectification / AdamW foreach": (
        "rectification in gradient space, to a step of AdamW"
    ),
    "update space: rectification / AdamW foreach": (
        "rectification in update space, to a step of AdamW"
    ),
}
"""The rows that README shows, and what it calls them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write docs/costs.md from runs/bench.json, and the figures of README."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.page", description=main.__doc__)
    parser.add_argument("bench", type=Path, nargs="?", default=Path("runs/bench.json"))
    parser.add_argument("--sizes", type=Path, default=Path("runs/bench-cuda.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/costs.md"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(arguments)
    rows = json.loads(options.bench.read_text(encoding="utf-8"))
    if options.sizes.exists():
        rows += json.loads(options.sizes.read_text(encoding="utf-8"))
    options.page.write_text(costs_page(rows), encoding="utf-8")
    readme = options.readme.read_text(encoding="utf-8")
    options.readme.write_text(with_figures(readme, rows), encoding="utf-8")


def costs_page(rows: Rows) -> str:
    """The page: a table of all rows, by the device and the workload they were measured on."""
    settings: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        settings.setdefault((row["device"], row["workload"]), []).append(row)
    measured = [
        f"## {device}\n\n`make bench`, {workload}.\n\n{_table(of_setting)}"
        for (device, workload), of_setting in settings.items()
    ]
    return "\n\n".join(section.strip("\n") for section in (HEAD, *measured, ON_A_GPU)) + "\n"


def with_figures(readme: str, rows: Rows) -> str:
    """README with the figures of these rows in its table of costs.

    >>> rows = [{"quantity": "two gradients: recorded step / step", "ratio": 1.024}]
    >>> with_figures("| a recorded step, two gradients, to the step | 1.1 | 9 |", rows)
    '| a recorded step, two gradients, to the step | 1.02 | 9 |'
    """
    for row in rows:
        if name := SHORT.get(row["quantity"]):
            line = re.compile(rf"^(\| {re.escape(name)} \|)[^|]*\|", re.MULTILINE)
            readme, count = line.subn(rf"\g<1> {row['ratio']:.2f} |", readme)
            if count != 1:
                raise ValueError(
                    f"README's table of costs should have one row `{name}`. Found {count}. "
                    "Give the row that name."
                )
    return readme


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        f"| {row['quantity'].replace('|', chr(92) + '|')} | {row['ratio']:.3g} "
        f"| {Bar(row['bar'], row['at_least'])} | {row['spread']:.2g} | {row['rounds']} |"
        for row in rows
    ]
    head = ["| ratio | median | bar | spread | rounds |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    main()
