"""The picture of a block of code is the axes or the figure that its last line gives."""

from typing import Any

from matplotlib import pyplot
from matplotlib.artist import Artist
from sphinx_gallery.scrapers import figure_rst


def returned(block: Any, told: dict[str, Any], gallery: dict[str, Any]) -> str:
    """Save the figure of the last line's value, if it has one, and return what shows it."""
    shown = told["example_globals"].get("___")
    pyplot.close("all")
    figure = shown.get_figure(root=True) if isinstance(shown, Artist) else None
    if figure is None:
        return ""  # what shows itself as HTML is still to be asked
    told["example_globals"]["___"] = None  # or a later block would show it again
    place = next(told["image_path_iterator"])
    figure.savefig(place, dpi=150, bbox_inches="tight")
    return str(figure_rst([place], gallery["src_dir"]))


def _get_sg_image_scraper() -> Any:
    """How sphinx-gallery asks a module for it."""
    return returned
