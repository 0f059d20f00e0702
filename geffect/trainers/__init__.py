"""Trainers: recorded and rectified as they are, and one for unlearning."""

from .callback import GEffectCallback
from .rectify import RectifyMixin, rectify
from .trackers import Trackers
from .unlearning import UnlearningTrainer

__all__ = ["GEffectCallback", "RectifyMixin", "Trackers", "UnlearningTrainer", "rectify"]
