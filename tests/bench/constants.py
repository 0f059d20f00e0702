"""The constants that `geffect estimate` is shipped with, from the results of the benchmark.

    python -m tests.bench.constants runs/bench.json runs/bench-cuda.json

`make bench` does it. A row replaces that of the same device, workload and step, and tells the
machine and the version of torch that it was measured with, and the command.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geffect.costs.measured import RECORDED, RECTIFIED

from . import traffic

OUT = Path(__file__).parents[2] / "geffect" / "costs" / "constants.json"
SUFFIX = " / plain step"
OF_BOTH = {
    "two gradients: recorded step / step": "recorder, two gradients",
    "three gradients: recorded step / same passes": "recorder, three gradients",
}
"""What the benchmark of a CPU calls such steps."""
KEPT = ("device", "workload", "ratio", "spread", "rounds", "machine", "torch", "command")

DEVICES: Mapping[str, Mapping[str, Any]] = {
    "NVIDIA H200": {
        "bytes_per_second": 4.3e12,
        "operations_per_second": 6 * 1.24e9 * 2 * 8 * 256 / 0.108,
        "workload": "Llama of 1.24B parameters, bfloat16, 8 x 256 tokens a side",
    }
}
"""What was measured of reading two vectors once, and of the plain step, on a GPU."""


def constants(results: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> dict[str, Any]:
    """The constants, from rows of the benchmark and those that are known of other devices."""
    wanted = {*RECORDED.values(), *RECTIFIED.values()}
    rows = [
        {"quantity": _called(row)} | {name: row[name] for name in KEPT}
        for row in results
        if _called(row) in wanted and not row["quick"]
    ]
    place = ("device", "workload", "quantity")
    news = {tuple(row[name] for name in place) for row in rows}
    earlier = [
        row for row in known.get("rows", []) if tuple(row[name] for name in place) not in news
    ]
    return {
        "rows": [*earlier, *rows],
        "numbers_read_and_written": {
            name: step.read + step.written for name, step in traffic.STEPS.items()
        },
        "devices": DEVICES,
    }


def _called(row: Mapping[str, Any]) -> str:
    name: str = row["quantity"]
    return OF_BOTH.get(name, name.removesuffix(SUFFIX))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the constants."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.constants", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    results = [
        row for path in options.results for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    text = json.dumps(constants(results, known), indent=1) + "\n"
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
