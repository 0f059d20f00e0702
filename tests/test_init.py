"""The face of the package: what `import geffect` gives."""

import importlib
import pkgutil
from importlib.metadata import version

import pytest

import geffect
from tests.utils.subprocesses import in_another_process

MODULES = sorted(
    {"geffect", *(m.name for m in pkgutil.walk_packages(geffect.__path__, "geffect."))}
)
ROOMS = ("analysis", "capture", "effects", "objectives", "plots", "projection", "trainers")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_there_after_one_import(room: str) -> None:
    code = f"import geffect; print(geffect.{room}.__name__, geffect.{room}.__all__[0])"
    name, first = in_another_process(code).split()
    assert name == f"geffect.{room}"
    assert hasattr(importlib.import_module(name), first)


def test_only_public_names_are_listed() -> None:
    code = "import geffect, geffect.store, geffect.analysis; print(*dir(geffect))"
    listed = in_another_process(code).split()
    assert listed == sorted(geffect.__all__)
    assert {"Recorder", "open_run", "analysis", "plots"} < set(listed)
    assert [name for name in listed if name.startswith("_")] == ["__version__"]


def test_the_version_is_that_of_the_package() -> None:
    assert geffect.__version__ == version("geffect")
