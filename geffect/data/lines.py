"""The rows of a data file, each with where it stands."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FORMS = (("question", "answer"), ("prompt", "completion"), ("text",), ("messages",))
"""The keys that a row may have."""


def rows_of(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL file, or of a folder that `datasets` saved, after the words for where.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"text": "Ada"}')
    >>> [row for where, row in rows_of(path)]
    [{'text': 'Ada'}]
    """
    if path.is_dir():
        return _saved_rows(path)
    if path.is_file():
        return _lines(path)
    raise FileNotFoundError(
        f"A data file should exist. Found nothing at `{path}`. Pass a JSONL file, or a folder that "
        "`datasets` saved."
    )


def form_of(row: object, where: str) -> tuple[str, ...]:
    """Which of the `FORMS` a row has."""
    found = row.keys() if isinstance(row, Mapping) else ()
    for form in FORMS:
        if set(form) <= set(found):
            return form
    keys = f"the keys {', '.join(map(str, found))}" if found else f"{type(row).__name__} {row!r}"
    raise ValueError(f"{where} should have {forms()}. Found {keys}. Name its texts so.")


def answered(row: object, name: str, where: str) -> tuple[Mapping[str, Any], str]:
    """The row with the text of another of its keys as its answer, and the words for where.

    >>> row = {"question": "Who?", "answer": "Ada.", "alternate": "I do not know."}
    >>> answered(row, "alternate", "The row")[0]["answer"]
    'I do not know.'
    """
    *_, key = form_of(row, where)
    assert isinstance(row, Mapping)
    text = row.get(name)
    if not (isinstance(text, str) and text.strip()):
        found = repr(text) if name in row else f"the keys {', '.join(map(str, row))}"
        raise ValueError(
            f"{where} should have an answer in `{name}`, which the objective takes. Found {found}. "
            "Write the text there, one a row: of several answers each in a row of its own."
        )
    if key != "messages":
        return {**row, key: text}, f"{where} `{name}`"
    *before, last = row[key]
    return {**row, key: [*before, {**last, "content": text}]}, f"{where} `{name}`"


def forms() -> str:
    """The `FORMS` in words."""
    return ", or ".join(" and ".join(f"`{key}`" for key in form) for form in FORMS)


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:  # some editors of Windows begin a file with the mark
                line = line.removeprefix(BOM_UTF8)
            if not line.strip():
                continue
            where = f"`{path}`, line {number},"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} should be text in UTF-8. Found {error.object[error.start]:#04x} at "
                    f"byte {error.start + 1} of the line. Save the file as UTF-8."
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} should be a JSON object with {forms()}. Found text that is no JSON: "
                    f"{error}. Write one JSON object a line."
                ) from error
            if rb"\ud" in line.lower():
                _check_whole(row, where)
            yield where, row


def _check_whole(row: object, where: str) -> None:
    """Refuse halves of characters, which JSON may hold and no tokenizer reads."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} should hold whole characters. Found {error.object[error.start]!a}, which is "
            "half of one, as of an emoji that was cut. Mend the row, or leave it out."
        ) from error


def _saved_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"`datasets` should be installed to read the folder `{folder}`. Found no such package. "
            "Run `pip install datasets`, or write the rows into a JSONL file."
        ) from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"`{folder}` should be a folder that `datasets` saved with save_to_disk. Found another "
            "one. Save it so, or write the rows into a JSONL file."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        raise ValueError(
            f"`{folder}` should hold the rows of one data set. Found the splits "
            f"{', '.join(saved)}. Pass the folder of one, such as `{folder / next(iter(saved))}`."
        )
    for number, row in enumerate(saved):
        yield f"`{folder}`, row {number},", row
