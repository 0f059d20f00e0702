"""Text of pages whose lines do not break between a number and its sign of per cent."""

from typing import Any

from docutils import nodes

from geffect.numbers import unbroken


def join(app: Any, document: nodes.document) -> None:
    """Join the two in all text of a page but its code."""
    for text in [*document.findall(nodes.Text)]:
        if not isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.raw):
            text.parent.replace(text, nodes.Text(unbroken(text)))


def setup(app: Any) -> dict[str, Any]:
    """Have it done as each page has been read."""
    app.connect("doctree-read", join)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
