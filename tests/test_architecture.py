"""The architecture: who may import whom, what stands where, and what the interfaces promise."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import geffect

ROOT = Path(__file__).parents[1]

LAYERS = {
    "sources": 1, "gram": 1, "scores": 1, "spans": 1, "correlation": 1, "encodings": 1,
    "distributed": 1, "batch": 1,
    "text": 0, "near": 0, "numbers": 0, "drafts": 0, "notes": 0, "places": 1, "devices": 1,
    "kernels": 1, "beside": 1, "forwards": 1,
    "interrupts": 0, "hooks": 1, "codes": 0, "nested": 0,
    "data": 2, "layers": 2, "dots": 2, "losses": 2, "optimizers": 2, "fingerprints": 2, "plots": 2,
    "pages": 2,
    "gradients": 3, "steps": 3, "sketch": 3, "groups": 3,
    "risk": 4, "store": 4, "projection": 4, "relearning": 4,
    "objectives": 5, "effects": 5, "evaluation": 5,
    "capture": 6, "analysis": 6, "edits": 6,
    "checkpoints": 7, "trainers": 7, "requests": 7, "costs": 7,
    "audit": 8,
    "demo": 9,
    "report": 10,
    "cli": 11,
    "__main__": 12,
}  # fmt: skip

# Who may import what other projects made, at run time.
THIRD_PARTY = {
    "torch": [
        "distributed",
        "hooks",
        "codes",
        "nested",
        "devices",
        "kernels",
        "beside",
        "forwards",
        "dots",
        "encodings",
        "sketch",
        "losses",
        "data",
        "optimizers",
        "fingerprints",
        "steps",
        "gradients",
        "relearning",
        "batch",
        "risk",
        "objectives",
        "effects",
        "evaluation",
        "projection",
        "capture",
        "edits",
        "checkpoints",
        "costs",
        "requests",
        "trainers",
        "audit",
        "demo",
    ],
    "torch.func": ["effects"],
    "triton": ["kernels"],
    "torchjd": ["projection.from_torchjd"],
    "h5py": ["store"],
    "pandas": ["scores", "analysis", "plots", "evaluation", "audit", "demo", "report", "cli"],
    "matplotlib": ["plots", "demo.figures", "report", "cli"],
    "scipy": ["correlation", "analysis", "plots", "evaluation", "audit"],
    "seaborn": ["plots", "demo.figures", "cli"],
    "transformers": ["demo", "trainers", "checkpoints", "costs", "audit", "cli"],
    "tokenizers": ["demo"],
    "huggingface_hub": ["checkpoints.hub"],
    "typer": ["cli"],
    "jinja2": ["pages"],
    "markupsafe": ["pages"],
    "rich": ["cli", "demo"],
}

# What a package must not import although its layer would allow it.
FORBIDDEN = {
    "capture": ["projection", "analysis", "effects"],
    "projection": ["store", "capture"],
    "plots": ["analysis", "store"],
    "analysis": ["capture", "projection"],
    "edits": ["capture", "store", "analysis"],
}

HEAVY = ["torch", "matplotlib", "pandas", "transformers", "h5py"]


@dataclass(frozen=True)
class Import:
    """A module that is imported, and whether that happens when the program runs."""

    module: str
    at_run_time: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, through the two links."""
    found = {}
    for folder, _, files in os.walk(ROOT / "geffect", followlinks=True):
        for file in (Path(folder, name) for name in files if name.endswith(".py")):
            dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[dotted.removesuffix(".__init__")] = file
    return found


def component(name: str) -> str:
    """The package or the file of `geffect` itself that a module belongs to."""
    return name.split(".")[1]


COMPONENTS = sorted(name for name in modules() if name != "geffect")


def test_a_module_imports_only_from_lower_layers() -> None:
    assert not [
        f"{name} imports {imported}"
        for name in COMPONENTS
        for imported in internal(name)
        if component(imported) != component(name)
        and LAYERS[component(imported)] >= LAYERS[component(name)]
    ]


def test_there_is_no_cycle() -> None:
    graph = {name: set(internal(name)) for name in COMPONENTS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {error.args[1]}")


@pytest.mark.parametrize(("name", "others"), FORBIDDEN.items())
def test_forbidden_imports(name: str, others: list[str]) -> None:
    for module in (module for module in COMPONENTS if component(module) == name):
        assert not {component(imported) for imported in internal(module)} & set(others), module


def test_nothing_below_the_demo_knows_analysis_or_plots() -> None:
    """But for what hands pictures to a Trainer's trackers, and what an audit reads of a run."""
    known = {"geffect.audit.page": {"plots"}, "geffect.audit.geometry": {"analysis"}}
    rooms = [name for name in COMPONENTS if component(name) not in ("demo", "report", "cli")]
    for name in {*rooms} - {"geffect.trainers.trackers"}:
        others = {component(imported) for imported in internal(name)} - {component(name)}
        assert not others & {"analysis", "plots"} - known.get(name, set()), name


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_party_imports(package: str) -> None:
    allowed = {f"geffect.{name}" for name in THIRD_PARTY[package]}
    for module in modules():
        reached = {i.module for i in imports(module) if i.at_run_time and within(i.module, package)}
        if not any(within(module, name) for name in allowed):
            assert not reached, module


def test_nothing_is_imported_that_is_not_declared() -> None:
    declared = {re.split(r"\W", line)[0] for line in project()["project"]["dependencies"]}
    declared |= {
        re.split(r"\W", line)[0]
        for extra in project()["project"]["optional-dependencies"].values()
        for line in extra
    }
    declared |= {"triton"}  # comes with torch where there is a GPU for it
    third = {i.module.partition(".")[0] for name in modules() for i in imports(name)}
    assert third - declared - {"geffect"} - sys.stdlib_module_names == set()


@pytest.mark.parametrize("bare", ["analysis", "plots"])
def test_linked_packages_have_one_name(bare: str) -> None:
    assert not [name for name in modules() for i in imports(name) if within(i.module, bare)]


def test_packages_are_those_on_disk() -> None:
    """Folders of pages too: one that is not listed is built with a warning."""
    on_disk = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(ROOT / "geffect", followlinks=True)
        if files and Path(folder).name != "__pycache__"
    }
    assert set(project()["tool"]["setuptools"]["packages"]) == on_disk
    assert {"geffect.analysis", "geffect.plots", "geffect.report.templates"} <= on_disk


def test_files_beside_the_modules_are_installed() -> None:
    data = project()["tool"]["setuptools"]["package-data"]
    for folder, _, files in os.walk(ROOT / "geffect", followlinks=True):
        if Path(folder).name != "__pycache__":
            patterns = data.get(".".join(Path(folder).relative_to(ROOT).parts), ())
            kept = {name for name in files if any(fnmatch(name, p) for p in patterns)}
            assert {name for name in files if not name.endswith(".py")} == kept, folder


@pytest.mark.parametrize("name", ["analysis", "plots"])
def test_links(name: str) -> None:
    link = ROOT / "geffect" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert project()["tool"]["setuptools"]["package-dir"][f"geffect.{name}"] == name
    # What reads folders, as type checkers do, sees every module of the package.
    seen = {path.name for path in link.glob("*.py")}
    assert seen == {path.name for path in (ROOT / name).glob("*.py")} > {"__init__.py"}


@pytest.mark.parametrize(
    "programs",
    [
        # One after the other in one process, which forgets no module.
        {
            "import geffect; dir(geffect), geffect.__version__; import geffect.cli.main": HEAVY,
            "import geffect.store.writer": ["torch", "pandas"],
            "from geffect import open_run; import geffect.analysis": ["torch", "matplotlib"],
            "import geffect; geffect.plots, geffect.analysis": ["torch"],
        },
        {
            "import geffect as g; g.effects, g.capture; from geffect import Recorder, Rectifier": [
                "pandas", "matplotlib", "transformers"
            ]
        },
        {
            "import geffect.plots": ["torch", "h5py", "geffect.analysis"],
            "import geffect.report": ["torch", "seaborn", "scipy"],
        },
    ],
    ids=["reading", "recording", "plots"],
)  # fmt: skip
def test_what_is_loaded(programs: dict[str, list[str]]) -> None:
    show = "\n".join(
        f"{program}; import sys; print(*sorted(set({unloaded}) & set(sys.modules)))"
        for program, unloaded in programs.items()
    )
    show = f"import gc; gc.disable()\n{show}"  # it does nothing but import
    ended = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("geffect", ["Recorder", "Rectifier", "open_run"]),
        (
            "geffect.objectives",
            ["GradientAscent", "WeightedGradientAscent", "NPO", "GradDiff"],
        ),
        ("geffect.projection", ["gru"]),
        ("geffect.analysis", ["g_effect", "cosine", "conflict", "predicted_change"]),
        ("geffect.plots", ["heatmap", "profile", "trajectory", "tradeoff", "sheet"]),
    ],
)
def test_public_interfaces(module: str, names: list[str]) -> None:
    interface = importlib.import_module(module)
    assert set(names) <= set(interface.__all__)
    assert all(callable(getattr(interface, name)) for name in names)


def test_all_that_is_listed_exists() -> None:
    for name in sorted(modules()):
        if within(name, "geffect.kernels") and find_spec("triton") is None:
            continue
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", [])
        assert len(set(listed)) == len(listed), name
        assert [entry for entry in listed if not hasattr(module, entry)] == [], name


def test_lazy_names_are_complete() -> None:
    named = {*geffect._HOMES, *geffect._ROOMS, "__version__"}
    assert set(geffect.__all__) == named == set(dir(geffect))
    with pytest.raises(AttributeError, match="no attribute 'recorder_of'"):
        geffect.recorder_of  # noqa: B018


def test_package_code_neither_prints_nor_postpones() -> None:
    for name, path in modules().items():
        calls = [node.func for node in nodes(name) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not printed, name
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX)\b", source), name


def test_no_class_is_long() -> None:
    assert not [
        f"{name}.{node.name}"
        for name in modules()
        for node in nodes(name)
        if isinstance(node, ast.ClassDef) and lines_of(node) >= 300
    ]


def test_no_function_takes_many_parameters() -> None:
    """But constructors of public classes, commands, whose parameters are a user's words, and
    kernels, which take a pointer for each vector."""
    for name in modules():
        wide = {called for called, count in parameters(parsed(name)) if count > 8}
        wide -= {f"{public}.__init__" for public in PUBLIC}
        wide -= kernels(parsed(name))
        assert wide <= ({"command"} if within(name, "geffect.cli") else set()), name


def test_a_test_module_imports_no_other() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = re.split(r"\W+", ast.unparse(node))
                named = [word for word in words if re.match(r"test_|conftest$", word)]
                assert not named, path


def test_the_files_speak_of_no_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in (ROOT / name for name in names.split("\0") if name):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            places = "work|root|home" if (ROOT / "tests") in path.parents else "work|root|home|tmp"
            assert not re.findall(rf"(?<![\w.~])/(?:{places})/\S*", text), path


def test_nobody_asks_which_objective_it_is() -> None:
    """An objective says by itself what it needs: no isinstance of one outside of their package."""
    from geffect import objectives
    from geffect.objectives import Objective

    kinds = {
        kind
        for kind, value in vars(objectives).items()
        if isinstance(value, type) and issubclass(value, Objective)
    }
    assert {"Objective", "NPO", "GradDiff", "Combination", "SimNPO"} <= kinds
    for name in (name for name in COMPONENTS if component(name) != "objectives"):
        asked = {
            word
            for node in nodes(name)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
            for word in re.findall(r"\w+", ast.unparse(node.args[1]))
        }
        assert not asked & kinds, name


def kernels(tree: ast.AST) -> set[str]:
    """The functions that Triton compiles."""
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    }


PUBLIC = {
    entry
    for name, path in modules().items()
    if path.name == "__init__.py"
    for entry in getattr(importlib.import_module(name), "__all__", [])
}
"""What a package shows."""


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def nodes(name: str) -> tuple[ast.AST, ...]:
    """All that a module says, outer before inner."""
    return tuple(ast.walk(parsed(name)))


def lines_of(node: ast.ClassDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def parameters(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Every function by name, with its class in front, and how many parameters it has."""
    for node in ast.iter_child_nodes(tree):
        inner = prefix
        if isinstance(node, ast.ClassDef):
            inner = f"{node.name}."
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            given = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            taken = [name for name in given if name not in ("self", "cls")]
            further = [args.vararg, args.kwarg]
            yield prefix + node.name, len(taken) + len(further) - further.count(None)
        yield from parameters(node, inner)


@cache
def imports(name: str) -> tuple[Import, ...]:
    """All that the module imports, anywhere in it, by dotted name."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    checked_only = {
        id(node)
        for branch in nodes(name)
        if isinstance(branch, ast.If)
        and isinstance(branch.test, ast.Name)
        and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    return tuple(
        Import(module, id(node) not in checked_only)
        for node in nodes(name)
        for module in imported_by(node, package)
    )


def imported_by(node: ast.AST, package: str) -> Iterator[str]:
    """The modules that one statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level]
        base = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module or ""
        for alias in node.names:
            yield home(base, alias.name)
    elif (
        isinstance(node, ast.Attribute)
        and node.attr == "func"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
    ):
        yield "torch.func"


def home(base: str, name: str) -> str:
    """Where a name comes from: a module, or what the lazy package fetches it from."""
    if base == "geffect" and name in geffect._HOMES:
        return f"geffect.{geffect._HOMES[name]}"
    is_module = f"{base}.{name}" in modules() or (base, name) == ("torch", "func")
    return f"{base}.{name}" if is_module else base


def internal(name: str) -> list[str]:
    """The modules of the package that a module imports, also for its annotations alone."""
    return [i.module for i in imports(name) if i.module.startswith("geffect.")]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_pages_link_to_what_is_there_and_leave_nothing_open(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
    for file, _, heading in (link.partition("#") for link in links):
        target = page.parent / file if file else page
        assert target.exists(), file
        read = target.read_text(encoding="utf-8") if heading else ""
        titles = re.findall(r"^#+ (.*)$", read, re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not heading or heading in anchors
    assert "<!--" not in text


def test_the_documents_are_in_a_source_distribution() -> None:
    said = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"):
        assert name in said and (ROOT / name).exists()
    assert "graft docs" in said
