"""Trainers: the same record from somebody else's training loop, by its events alone."""

from .callback import GEffectCallback

__all__ = ["GEffectCallback"]
