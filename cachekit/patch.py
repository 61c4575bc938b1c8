"""Put a function in the place of a method of one instance, and take it out again. Knows nothing of caching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class Patch:
    """``module.<name>`` replaced by ``partial(function, *bound, original)`` on the instance.

    ``function`` must be a top-level function: then deepcopy and pickle of the module carry the patch along, bound to
    the copy. The original may itself stand in the instance's ``__dict__``, as accelerate puts it there.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any], *bound: Any) -> None:
        self.module, self.name = module, name
        self.shadowed = name in module.__dict__
        self.original = getattr(module, name)
        self.replacement = functools.partial(function, *bound, self.original)
        functools.update_wrapper(self.replacement, self.original)
        module.__dict__[name] = self.replacement

    @property
    def on_top(self) -> bool:
        """Whether nobody has put something else over the patch since."""
        return self.module.__dict__.get(self.name) is self.replacement

    @property
    def in_place(self) -> bool:
        """Whether calls still come by: nothing lies over the patch but what says (``__wrapped__``) that it wraps it."""
        found = self.module.__dict__.get(self.name)
        while found is not None and found is not self.replacement:
            found = getattr(found, "__wrapped__", None)
        return found is not None

    def remove(self) -> bool:
        """Restore the instance; False where another patch lies on top, and this one must stay beneath it."""
        if not self.on_top:
            # Taking it out now would take the other's hook with it, and its removal would bring this one back.
            return self.name not in self.module.__dict__
        if self.shadowed:
            self.module.__dict__[self.name] = self.original
        else:
            del self.module.__dict__[self.name]
        return True
