"""The site, built once for all processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from tests.utils import forks
from tests.utils.site import SOURCE, built


class Site(NamedTuple):
    """The pages of the site, and what was said as they were built."""

    pages: Path
    code: int
    said: str


@pytest.fixture(scope="session")
def site(shared_folder: Path, executed: Callable[[str], Path], quick_study: object) -> Site:
    """The site, its notebooks with their outputs."""
    out, said = shared_folder / "site", shared_folder / "site.json"
    with FileLock(f"{said}.lock"):
        if not said.exists():
            names = [path.stem for path in (SOURCE.parents[1] / "notebooks").glob("*.ipynb")]
            (folder,) = {executed(name).parent for name in names}
            said.write_text(json.dumps(forks.call(built, out, folder)), encoding="utf-8")
    return Site(out / "html", *json.loads(said.read_text(encoding="utf-8")))
