"""Reports: several runs held against each other on one page, and the page of a study."""

from .runs import runs_report
from .study import study_report

__all__ = ["runs_report", "study_report"]
