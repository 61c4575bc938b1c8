"""What a retrofit is measured by: the target, the original model, and its deep features."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.connections import Connection, LongSkips
from cachekit.errors import ConfigError
from cachekit.long_skips import remove_long_skips
from cachekit.main_stream import main_output
from cachekit.wrap import unwrap


def original_of(model: nn.Module) -> nn.Module:
    """A frozen copy of a model without its long skip connections and its cache.

    It stays in the mode that it is in, since in training it must drop what the model drops: where it kept a label that the
    model dropped for classifier-free guidance, it would teach the conditional prediction as the unconditional one.
    """
    original = remove_long_skips(unwrap(copy.deepcopy(model)))
    return original.requires_grad_(False)


class Features:
    """What a model's deep blocks, those with a long skip connection, returned in the call under way."""

    def __init__(self, model: nn.Module, long_skips: LongSkips) -> None:
        self.found: dict[str, Tensor] | None = None
        self.hooks = [
            model.get_submodule(connection.late).register_forward_hook(partial(_note, self, connection), with_kwargs=True)
            for connection in long_skips.connections
        ]

    @contextmanager
    def noted(self) -> Iterator[dict[str, Tensor]]:
        """The features of the calls within, by the block's path, in the order of the calls."""
        self.found = {}
        try:
            yield self.found
        finally:
            self.found = None

    def remove(self) -> None:
        """Take the hooks out again."""
        for hook in self.hooks:
            hook.remove()


def _note(
    features: Features, connection: Connection, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    # None when a checkpointed block runs again in the backward pass.
    if features.found is not None:
        features.found[connection.late] = main_output(connection.late, connection.main, args, kwargs, result)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the channels that the target has: all, or the first half where the rest is a learned variance.

    Raises:
        ConfigError: the shapes differ otherwise.
    """
    shapes = list(zip(prediction.shape, target.shape, strict=False))
    differing = [k for k, (ours, theirs) in enumerate(shapes) if ours != theirs]
    half = all(k > 0 and 2 * shapes[k][1] == shapes[k][0] for k in differing)
    if prediction.ndim != target.ndim or len(differing) > 1 or not half:
        raise ConfigError(
            f"the target is {tuple(target.shape)}, and the model predicts {tuple(prediction.shape)}; return a target of the same "
            "shape, or of half the channels where the model learns a variance"
        )
    for k in differing:
        prediction = prediction.narrow(k, 0, target.shape[k])
    # Under autocast predictions are half, in whose few digits small errors would be lost.
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    return (prediction - target.to(prediction)).square().mean()


def distance(features: dict[str, Tensor], originals: dict[str, Tensor]) -> Tensor:
    """||x - y||² / ||y||², averaged over the blocks."""
    return torch.stack([_relative(features[block], originals[block]) for block in originals]).mean()


def similarity(name: str, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean cosine of tensors, token by token, and relative L2 distance of the first of a pair to the second."""
    alike = [(x.detach(), y.detach()) for x, y in pairs if x.shape == y.shape]
    if not alike:
        return {}
    cosine = torch.stack([torch.cosine_similarity(x.float(), y.float(), dim=-1).mean() for x, y in alike]).mean()
    return {f"{name} cosine": cosine, f"{name} distance": torch.stack([_relative(x, y).sqrt() for x, y in alike]).mean()}


def adjacent(features: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each deep block's features with those of the one before it."""
    found = list(features.values())
    return list(zip(found[1:], found, strict=False))


def _relative(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float(), y.float()
    return (x - y).square().sum() / y.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
