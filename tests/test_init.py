"""The face of the package: what `import geffect` gives."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, is_typeddict

import pytest

import geffect
from tests.utils.subprocesses import in_another_process

ROOMS = geffect._ROOMS


@pytest.fixture
def unimported() -> Iterator[None]:
    """A process that has not imported the package yet; afterwards all is as it was."""
    ours = {name: found for name, found in sys.modules.items() if name.split(".")[0] == "geffect"}
    for name in ours:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "geffect"]:
        del sys.modules[name]
    sys.modules.update(ours)


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.usefixtures("unimported")
def test_a_room_is_there_after_one_import(room: str) -> None:
    package = importlib.import_module("geffect")
    assert package is not geffect and f"geffect.{room}" not in sys.modules
    found = getattr(package, room)
    assert found is sys.modules[f"geffect.{room}"] and found.__name__ == f"geffect.{room}"
    assert hasattr(found, found.__all__[0])


def test_only_public_names_are_listed() -> None:
    code = "import geffect, geffect.store, geffect.analysis; print(*dir(geffect))"
    listed = in_another_process(code).split()
    assert listed == sorted(geffect.__all__)
    assert {"Recorder", "open_run", "analysis", "plots"} < set(listed)
    assert [name for name in listed if name.startswith("_")] == ["__version__"]


def test_the_version_is_that_of_the_package() -> None:
    assert geffect.__version__ == version("geffect")


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function and class that a room or the package names, and the methods of the classes."""
    doors = ("", *ROOMS, "store", "checkpoints.estimators", "checkpoints.replay")
    for module in (importlib.import_module(f"geffect.{door}".rstrip(".")) for door in doors):
        listed = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        for name, found in ((name, getattr(module, name)) for name in listed):
            ours = getattr(found, "__module__", "").startswith("geffect") and callable(found)
            # Errors have no signature, and neither have the keywords of a function as a type.
            if not ours or found is geffect.RunFileError or is_typeddict(found):
                continue
            yield f"{module.__name__}.{name}", found
            for method, function in inspect.getmembers(found, inspect.isroutine):
                own = getattr(function, "__module__", None) or ""
                if inspect.isclass(found) and own.startswith("geffect"):
                    yield f"{module.__name__}.{name}.{method}", function


def test_no_signature_shows_an_address() -> None:
    shown = {name: inspect.signature(of).parameters.values() for name, of in public()}
    assert {"geffect.Recorder", "geffect.replay", "geffect.projection.Rectifier"} <= shown.keys()
    assert {"geffect.trainers.UnlearningTrainer", "geffect.open_run"} <= shown.keys()
    for name, parameters in shown.items():
        for parameter in parameters:
            said = repr(parameter.default)
            assert " at 0x" not in said, f"{name}: {parameter.name}={said}"
