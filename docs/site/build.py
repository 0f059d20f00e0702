"""Builds the site: copies its sources into a folder, where all that is generated lies too.

`python docs/site/build.py build/docs` leaves the pages in `build/docs/html`.
"""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[2]
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE")


def build(out: Path, told: Sequence[str] = (), *, notebooks: Path = ROOT / "notebooks") -> int:
    """Build the site in `out`, and return 0 if there was no warning.

    - `told`: further words for sphinx-build.
    - `notebooks`: where they are.
    """
    source = out / "source"
    shutil.rmtree(out, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copytree(ROOT / "docs", source / "docs")
    shutil.copytree(notebooks, source / "notebooks")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "docs" / "site" / "pages", source, dirs_exist_ok=True)
    place_others(source)
    os.environ["IPYTHONDIR"] = str(out / "ipython")  # settings of whoever builds change no page
    words = ["-W", "--keep-going", "-q", "-c", source / "docs", source, out / "html"]
    return build_main([*map(str, words), *told])


def place_others(source: Path) -> None:
    """Put the pages that no table of contents names at the end of the guide."""
    named = "".join(path.read_text(encoding="utf-8") for path in source.glob("*.rst"))
    pages = sorted(f"docs/{path.stem}" for path in (source / "docs").glob("*.md"))
    others = [page for page in pages if page not in re.findall(r"docs/\w+", named)]
    if others:
        guide = source / "guide.rst"
        lines = [guide.read_text(encoding="utf-8"), ".. toctree::", "   :maxdepth: 1"]
        lines += ["   :caption: More", "", *(f"   {page}" for page in others), ""]
        guide.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve(), sys.argv[2:]))
