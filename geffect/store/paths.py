"""What the path of a run file says, to the writer and the reader of the file."""

import os
from pathlib import Path

_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))


def place_of(path: str | os.PathLike[str]) -> Path:
    """Where a run file is or is to be: of a link what it points to, whatever the working folder."""
    given = os.fspath(path)
    should = "The path of a run file should be that of a file, as text."
    if not isinstance(given, str):
        raise TypeError(f"{should} Found {given!r}, which is bytes. Pass os.fsdecode(path).")
    try:
        given.encode()
        found = Path(given).resolve()
        found.exists()  # which a name that is too long has no answer to
    except PermissionError:  # the name is good, and a folder is closed
        raise
    except (UnicodeEncodeError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{should} Found {given!a}: {error}. Choose another name.") from error
    if given.endswith(_SEPARATORS) and not found.is_dir():
        raise ValueError(f"{should} Found `{given}`, which ends as a folder. Add a file name.")
    home = Path(given).parts[:1]
    if home and home[0].startswith("~") and not Path(home[0]).exists():
        raise ValueError(
            f"{should} Found `{given}`, where only a shell knows what `{home[0]}` is. Pass "
            "os.path.expanduser(path)."
        )
    return found
