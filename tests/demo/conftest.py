"""The subject that tests of the study share."""

from tests.utils.subject import subject

__all__ = ["subject"]
