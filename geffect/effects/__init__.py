"""PG-effects: what unlearning one sample, or one token, does to a risk."""

from .direction import direction
from .instances import InstanceEffects
from .samples import sample_effects
from .tokens import TokenEffects, token_effects

__all__ = ["InstanceEffects", "TokenEffects", "direction", "sample_effects", "token_effects"]
