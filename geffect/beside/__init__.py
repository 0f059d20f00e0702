"""Forwards beside those of a training step, which does not notice them."""

from .block import beside, random_numbers_kept

__all__ = ["beside", "random_numbers_kept"]
