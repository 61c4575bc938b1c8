"""What a long skip connection does with its two tensors: trainable modules ``fusion(x, skip) -> x``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.errors import ConfigError


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of ``x``."""
        weight = self.weight.float() if self.weight is not None else None
        bias = self.bias.float() if self.bias is not None else None
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class BoundedLinear(nn.Linear):
    """A linear layer whose largest singular value never exceeds ``bound``.

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
            top: Tensor = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -1]
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
        return {**super().__getstate__(), "_known": None}

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return functional.linear(x, self.bounded, self.bias)


class Paper(nn.Module):
    """Linear(LayerNorm([x ; skip])), initialised as torch does: another function than before from the start.

    Skip-DiT, arXiv 2411.17616, as in its authors' code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(2 * width, eps=1e-6)
        self.linear: nn.Linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(..., D) and (..., D) -> (..., D)."""
        fused: Tensor = self.linear(self.norm(torch.cat([x, skip], dim=-1)))
        return fused


class Residual(Paper):
    """x + Linear(LayerNorm([x ; skip])) with a linear layer that starts at zero: adding it changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(..., D) and (..., D) -> (..., D)."""
        return x + super().forward(x, skip)


class Spectral(Residual):
    """Residual with a bound on the linear layer's largest singular value, which training can't leave.

    The bound costs one eigendecomposition of a (D, D) matrix for each forward in training, and one in all while sampling.
    """

    def __init__(self, width: int, bound: float = 1.0) -> None:
        super().__init__(width)
        if not bound > 0:
            raise ConfigError(f"bound={bound}: a bound on singular values is above 0")
        self.linear = BoundedLinear(2 * width, width, bound)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


Factory = Callable[[int], nn.Module]
FUSIONS: Mapping[str, Factory] = MappingProxyType({"paper": Paper, "residual": Residual, "spectral": Spectral})


def fusion_name(fusion: str | Factory) -> str:
    """What a fusion is called in files; one of cachekit's own has its short name."""
    if isinstance(fusion, str):
        return fusion
    known = {factory: name for name, factory in FUSIONS.items()}
    return known.get(fusion) or f"custom {getattr(fusion, '__qualname__', type(fusion).__qualname__)}"


def make_fusion(fusion: Any, width: int) -> nn.Module:
    """A new fusion for streams of (..., width).

    Raises:
        ConfigError: an unknown name, or a factory that makes no module.
    """
    factory = FUSIONS.get(fusion) if isinstance(fusion, str) else fusion
    made = factory(width) if callable(factory) and not isinstance(factory, nn.Module) else None
    if not isinstance(made, nn.Module):
        names = ", ".join(map(repr, FUSIONS))
        raise ConfigError(f"fusion={fusion!r}; write one of {names}, or a callable (width) -> torch.nn.Module that takes (x, skip)")
    return made


def placed_as(block: nn.Module) -> dict[str, Any]:
    """Device and dtype of a block's weights, as arguments of ``to``."""
    for parameter in block.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": parameter.dtype}
    return {}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A seed for torch's CPU generator, which is as it was afterwards; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
