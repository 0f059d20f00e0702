"""Pages that open offline: the frame of a page, and charts that show their values."""

from .charts import Lines, Map, Series
from .frame import framed, page, word
from .scales import Scale

__all__ = ["Lines", "Map", "Scale", "Series", "framed", "page", "word"]
