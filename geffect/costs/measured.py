"""Extra time as a share of a step: what was measured, and what memory traffic takes at least.

`constants.json` is made by `python -m tests.bench.constants` from the results of the benchmark.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

RECORDED = {
    (2, "gram"): "recorder, two gradients",
    (3, "gram"): "recorder, three gradients",
    (2, "sketch"): 'recorder, two gradients, store="sketch"',
    (2, "int4"): 'recorder, two gradients, store="int4"',
}
RECTIFIED = {
    "gradient": "rectifier, gradient space",
    "update": "rectifier, update space",
    "coordinate": "rectifier, coordinate scope",
    "select": "rectifier, select",
    "sago": "rectifier, SAGO",
}
"""What the benchmark calls a step."""


@dataclass(frozen=True)
class Share:
    """Extra time as a share of the plain step, on a device.

    `workload` is what it was measured on; where `at_least`, it is what reading and writing memory
    takes, computed from what was measured of the device, and nothing else.
    """

    device: str
    share: float
    spread: float
    at_least: bool
    workload: str


@cache
def constants() -> Mapping[str, Any]:
    """What was measured."""
    text = files("geffect.costs").joinpath("constants.json").read_text(encoding="utf-8")
    found: Mapping[str, Any] = json.loads(text)
    return found


def share_of(setting: Mapping[str, Any]) -> tuple[Share, ...]:
    """The extra time of a step, on every device of which something is known.

    What was not measured of a device is left out. A step that is recorded and rectified takes the
    sum of both.
    """
    names = []
    if setting["store"] is not None:
        names.append(RECORDED.get((setting["gradients"], setting["store"])))
    if setting["rectifier"] is not None:
        names.append(RECTIFIED[setting["rectifier"]])
    if None in names:
        return ()
    return (*_measured(names), *_least(names, setting))


def _measured(names: list[Any]) -> list[Share]:
    found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for row in constants()["rows"]:
        place = row["device"], row["workload"]
        found.setdefault(place, {})[row["quantity"]] = row["ratio"] - 1, row["spread"]
    return [
        Share(
            device,
            sum(own[name][0] for name in names),
            sum(own[name][1] for name in names),
            at_least=False,
            workload=workload,
        )
        for (device, workload), own in found.items()
        if all(name in own for name in names)
    ]


def _least(names: list[Any], setting: Mapping[str, Any]) -> list[Share]:
    traffic = constants()["numbers_read_and_written"]
    if not all(name in traffic for name in names):
        return []
    sharded = setting["sharding"] in ("fsdp", "zero3")
    width = 4 if setting["dtype"] == "float32" else 2
    here = setting["parameters"] / (setting["gpus"] if sharded else 1)
    moved = sum(traffic[name] for name in names) * width * here
    tokens = setting["samples"] * setting["positions"] * setting["gradients"]
    operations = 6 * setting["parameters"] * tokens  # 2 forward, 4 backward, a parameter and token
    return [
        Share(
            device,
            moved / of["bytes_per_second"] / (operations / of["operations_per_second"]),
            0.0,
            at_least=True,
            workload=of["workload"],
        )
        for device, of in constants()["devices"].items()
    ]
