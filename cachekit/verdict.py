"""What a policy decided, as True or False."""

from __future__ import annotations

from typing import Any

from cachekit.errors import ConfigError


def decided(policy: Any, state: Any, step: Any) -> bool:
    """Ask a policy; a tensor or a number of one element counts as what it is true or false as.

    Raises:
        ConfigError: it returned None, as a function without ``return`` does, which would pass for a reuse at every step.
    """
    found = policy.decide(state, step)
    if found is None:
        raise ConfigError(f"{type(policy).__name__}.decide(state, step) returned None; return True to recompute, False to reuse")
    return bool(found)
