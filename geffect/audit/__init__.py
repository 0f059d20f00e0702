"""The audit: is what should be forgotten gone, or only hidden?

Attacks that try to bring it back, what they find beside a model that never knew, and a verdict.
"""

from .models import AuditModels
from .sets import AuditSet, AuditSets, sets_of

__all__ = ["AuditModels", "AuditSet", "AuditSets", "sets_of"]
