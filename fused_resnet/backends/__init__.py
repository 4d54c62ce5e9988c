"""Who computes: the backends, and the selection between them."""

from fused_resnet.backends.cpu import empty_cache
from fused_resnet.backends.selection import (
    ACTIVATIONS,
    available_backends,
    backend_report,
    context_backend,
    select,
    select_pooled,
    surroundings,
    tunable_backends,
    use_backend,
)

__all__ = [
    "ACTIVATIONS",
    "available_backends",
    "backend_report",
    "context_backend",
    "empty_cache",
    "select",
    "select_pooled",
    "surroundings",
    "tunable_backends",
    "use_backend",
]
