"""The audit: is what should be forgotten gone, or only hidden?

Attacks that try to bring it back, what they find beside a model that never knew, and a verdict.
The room is the function too: `geffect.audit(unlearned, original, ...)` is `auditing.audit`.
"""

import sys
from types import ModuleType
from typing import Any

from .auditing import audit
from .models import AuditModels
from .reading import sets_of
from .report import AuditReport
from .sets import AuditSet, AuditSets
from .thresholds import Thresholds

__all__ = [
    "AuditModels",
    "AuditReport",
    "AuditSet",
    "AuditSets",
    "Thresholds",
    "audit",
    "sets_of",
]


class _Room(ModuleType):
    """The module, which is called as the function that it is about."""

    def __call__(self, *models: Any, **options: Any) -> AuditReport:
        """See `geffect.audit.audit`."""
        return audit(*models, **options)


sys.modules[__name__].__class__ = _Room
