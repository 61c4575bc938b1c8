"""A call that is begun again: with the arguments that it was given, whatever the model did to them meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cachekit.containers import Containers
from cachekit.errors import ModelError
from cachekit.trajectory import version
from cachekit.tree import arguments

WRITTEN = (
    "the model writes into its argument {path}, and called its blocks otherwise than before, so that the call would have to be "
    "begun again with what is lost; pass a copy of that argument, or call model.cachekit.reset() where the model's calls change"
)

# A tensor, a copy of it, and how often it had been written into when that was made.
Kept = tuple[Tensor, Tensor, int | None]


class Again:
    """The arguments of a call that may have to be begun again.

    Args:
        args, kwargs: before the call.
        kept: tensors of which there are copies.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Iterable[Kept]) -> None:
        self._containers = Containers(args, kwargs)
        self._given = [(path, tensor, version(tensor)) for path, tensor in arguments(args, kwargs)]
        self._copies = {id(tensor): (values, count) for tensor, values, count in kept}
        for _, tensor, count in self._given:
            # Under inference mode nobody counts how often it is written into.
            if count is None and id(tensor) not in self._copies:
                self._copies[id(tensor)] = tensor.clone(), None

    def restore(self) -> None:
        """Undo what the model has done to them, of tensors those of which there is a copy.

        Raises:
            ModelError: there is none.
        """
        self._containers.restore()
        for path, tensor, count in self._given:
            values, noted = self._copies.get(id(tensor), (None, None))
            if values is not None and noted == count:
                if (version(tensor) != count or count is None) and not torch.equal(tensor, values):
                    tensor.copy_(values)
            elif version(tensor) != count:
                raise ModelError(WRITTEN.format(path=".".join(map(str, path))))
