"""What a long skip connection does with its two tensors: trainable modules ``fusion(x, skip) -> x``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.bounded import BoundedLinear
from cachekit.errors import ConfigError


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), in the dtype of ``x``."""
        weight = self.weight.float() if self.weight is not None else None
        bias = self.bias.float() if self.bias is not None else None
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class OwnLinear(nn.Linear):
    """A linear layer that computes in its own dtype, whatever it is given: fusions may train in float32 in a half model.

    Autocast has the last word, as over any linear layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in the dtype of ``x``."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class Paper(nn.Module):
    """Linear(LayerNorm([x ; skip])), initialised as torch does: another function than before from the start.

    Skip-DiT, arXiv 2411.17616, as in its authors' code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(2 * width, eps=1e-6)
        self.linear: nn.Linear = OwnLinear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(..., D) and (..., D) -> (..., D)."""
        fused: Tensor = self.linear(self.norm(torch.cat([x, skip.to(x.dtype)], dim=-1)))
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
    """Device and dtype of a block's weights, as arguments of ``to``: of most of them, since a half model may keep some in float32.

    Weights that are only stored so (of one byte) are no dtype to compute in, and those that are elsewhere between two calls (on
    the meta device, as offloading leaves them) are on no device to stay on.
    """
    found: dict[tuple[torch.device, torch.dtype], int] = {}
    for parameter in block.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            placed = parameter.device, parameter.dtype
            found[placed] = found.get(placed, 0) + parameter.numel()
    if not found:
        return {}
    device, dtype = max(found, key=found.__getitem__)
    return {"dtype": dtype} if device.type == "meta" else {"device": device, "dtype": dtype}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A seed for torch's CPU generator, which is as it was afterwards; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
