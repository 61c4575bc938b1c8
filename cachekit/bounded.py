"""A linear layer with a bound on its largest singular value."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class BoundedLinear(nn.Linear):
    """A linear layer whose largest singular value never exceeds ``bound``, but for the rounding to its weight's dtype.

    The parameter is free; ``bounded`` is what multiplies: the parameter, scaled down where it must be (spectral normalisation,
    arXiv 1802.05957, as an upper bound and with the exact singular value instead of a running estimate).
    """

    def __init__(self, inputs: int, outputs: int, bound: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.bound = bound
        self._known: tuple[Any, Tensor] | None = None

    @property
    def bounded(self) -> Tensor:
        """The weight in use, (outputs, inputs). Gradients pass through the scale too."""
        with _full_precision(self.weight.device):
            wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
            sigma = torch.linalg.vector_norm(wide.T @ self._top(wide))
            bounded: Tensor = (wide * (self.bound / sigma.clamp_min(self.bound))).to(self.weight.dtype)
        return bounded

    def _top(self, wide: Tensor) -> Tensor:
        """The left singular vector of the largest singular value, (outputs,).

        Sampling finds it once. Where weights may change it is found each time, since one that is written through ``.data`` (as
        optimisers and averages do) doesn't show it; ``train()`` and ``eval()`` forget it for the same reason.
        """
        changing = self.training or self.weight.is_inference() or (torch.is_grad_enabled() and self.weight.requires_grad)
        seen = None if changing else (id(self.weight), self.weight._version, self.weight.data_ptr())
        if seen is not None and self._known is not None and self._known[0] == seen:
            return self._known[1]
        with torch.no_grad():
            # So that large weights don't overflow in the product, and lost ones come out lost, as of any layer, instead of raising.
            scaled = wide / wide.abs().amax().clamp_min(torch.finfo(wide.dtype).tiny)
            top: Tensor = torch.linalg.eigh(torch.nan_to_num(scaled @ scaled.T)).eigenvectors[:, -1]
        self._known = None if seen is None else (seen, top)
        return top

    def train(self, mode: bool = True) -> BoundedLinear:
        """As in torch."""
        self._known = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._known = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in the dtype of ``x``."""
        return functional.linear(x.to(self.weight.dtype), self.bounded, self.bias).to(x.dtype)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast: products of a few digits bound nothing, and half precision has no eigendecomposition."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
