"""The manifest: model, losses, optimizer and versions of a run, in a form that JSON can hold."""

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from typing import Any

from torch import nn

from geffect.distributed import world_size
from geffect.layers import trainable
from geffect.places import is_adapter
from geffect.store.schema import VERSION

PACKAGES = ("geffect", "torch", "transformers", "h5py", "numpy")


def manifest(
    model: nn.Module,
    *,
    losses: Mapping[str, Any],
    rectifier: Mapping[str, object] | None,
    optimizer: Mapping[str, Any] | None,
    metadata: Mapping[str, Any],
    **further: Any,
) -> dict[str, Any]:
    """Provenance of a run: no paths, so that a file can be passed on."""
    parameters = trainable(model).values()
    return {
        "format_version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **_versions(),
        },
        "model": {
            "class": type(model).__name__,
            "trainable_tensors": len(parameters),
            "trainable_numbers": sum(parameter.numel() for parameter in parameters),
            # Effects of adapters are those of their own factors, not of the weights they change.
            "space": "adapter" if _is_adapted(model) else "weights",
            "processes": world_size(),
        },
        "losses": losses,
        "rectifier": None if rectifier is None else dict(rectifier),
        "optimizer": optimizer,
        "metadata": metadata,
        **further,
    }


@cache
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in PACKAGES}


def _is_adapted(model: nn.Module) -> bool:
    return any(map(is_adapter, trainable(model)))


def as_json(metadata: Mapping[str, Any], argument: str = "metadata") -> dict[str, Any]:
    """The metadata as JSON gives it back."""
    try:
        _check_keys(metadata)
        found: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{argument}` should hold what JSON can: text, finite numbers, lists, mappings. "
            f"Found: {error}. Turn other values into text first."
        ) from error
    return found


def _check_keys(value: object) -> None:
    """Refuse keys that JSON would write as text, where 1 and "1" are the same."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"keys must be text, not {key!r}")
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_keys(inner)
