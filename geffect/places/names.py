"""The names of tensors taken apart: their modules, and the list of modules they stand in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .adapters import TENSOR
from .words import Said, is_norm, said

Path = tuple[str, ...]

# What methods put between a module and its tensor.
_INSERTED = re.compile(
    rf"\.(?:{TENSOR})(?=\.|$)|\.(?:parametrizations|original_module|modules_to_save\.[^.]+)(?=\.)"
    r"|\.original\d?$"
)
_RECURRENT = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)_l(\d+)(?:_reverse)?")
# A stage is a list of lists, and its layers are those of the inner ones.
_STAGE = re.compile(
    r"(?:^|.*\.)(?:stages?(?=\.\d+\.(?:layers?|blocks?)\.\d)|layers(?=\.\d+\.blocks\.\d))"
)
_INNER = frozenset({"layer", "layers", "block", "blocks"})


@dataclass(frozen=True)
class Spot:
    """A name taken apart.

    - `path`: its modules, without those that hold all tensors.
    - `unit`: where in the path the number of its layer stands, -1 for none.
    - `in_stage`: whether it stands in a stage, but in none of its layers.
    - `module`: the path inside of the layer; the whole of it outside of layers.
    - `said`: what words say of the modules above the unit.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    unit: int
    in_stage: bool
    is_recurrent: bool
    module: str
    said: Said

    @property
    def in_stack(self) -> bool:
        """Whether it stands in a list of modules that are layers, as far as words say."""
        return self.unit >= 0 and self.said.part is None

    @property
    def stack(self) -> Path:
        """The list of modules."""
        return self.path[: self.unit]

    @property
    def number(self) -> int:
        """Its place in that list."""
        return int(self.path[self.unit])

    @property
    def is_leaf(self) -> bool:
        """Whether what stands in the list holds the tensor itself."""
        return self.unit == len(self.path) - 1 and not self.is_recurrent

    @property
    def is_matrix(self) -> bool:
        """Whether it has more than one dimension, as norms and biases do not."""
        return len(self.shape) > 1


def spots(shapes: Mapping[str, Sequence[int]]) -> list[Spot]:
    """The names of a model taken apart, in its order."""
    plain = [_INSERTED.sub("", name) for name in shapes]
    paths = [_path(name) for name in plain]
    held = _common(paths)
    stages = {found[0] for path in paths if (found := _STAGE.match(".".join(path)))}
    units = [_unit(path, stages) for path in paths]
    networks = _networks(paths, [unit for unit, _ in units])
    every = []
    of_each = zip(shapes, plain, paths, units, shapes.values(), strict=True)
    for name, own, whole, (unit, in_stage), shape in of_each:
        path = whole[held:]
        unit = max(unit - held, -1)
        last = own.rpartition(".")[2]
        words = ["" if whole[:i] in networks else word for i, word in enumerate(whole, 1)][held:]
        every.append(
            Spot(
                name,
                path,
                tuple(shape),
                unit,
                in_stage,
                is_recurrent=_RECURRENT.fullmatch(last) is not None,
                module=_module(name, unit + held if unit >= 0 else -1),
                # What has no list is also told by its own name.
                said=said(_outside_numbers(words) if in_stage or unit >= 0 else (*words, last)),
            )
        )
    return every


def _path(name: str) -> Path:
    *modules, last = name.split(".")
    if last.isdigit():  # of a list of tensors
        return (*modules, last)
    recurrent = _RECURRENT.fullmatch(last)
    return (*modules, recurrent[1]) if recurrent else tuple(modules)


def _module(name: str, unit: int) -> str:
    *inside, last = name.split(".")[unit + 1 :] or name.split(".")
    return ".".join(inside) or last


def _common(paths: Sequence[Path]) -> int:
    """How many modules hold all of the others: they tell nothing apart."""
    if len({*paths}) == 1:
        return max(len(paths[0]) - 1, 0)
    columns = zip(*paths, strict=False)
    held = sum(1 for _ in takewhile(lambda c: len({*c}) == 1 and not c[0].isdigit(), columns))
    # Of a single module the name tells what it is.
    return held - 1 if held and held == max(map(len, paths)) else held


def _unit(path: Path, stages: set[str]) -> tuple[int, bool]:
    """Where the number of the layer stands, and whether there is that of a stage alone."""
    first = next((i for i, module in enumerate(path) if module.isdigit()), -1)
    if first < 0 or ".".join(path[:first]) not in stages:
        return first, False
    inner = len(path) > first + 2 and path[first + 1] in _INNER and path[first + 2].isdigit()
    return (first + 2, False) if inner else (-1, True)


def _networks(paths: Sequence[Path], units: Sequence[int]) -> set[Path]:
    """The modules that are called as a norm is, but hold modules with lists: whole networks."""
    return {
        path[:i]
        for path, unit in zip(paths, units, strict=True)
        for i in range(1, unit)
        if is_norm(path[i - 1])
    }


def _outside_numbers(path: Sequence[str]) -> Path:
    return tuple(takewhile(lambda module: not module.isdigit(), path))
