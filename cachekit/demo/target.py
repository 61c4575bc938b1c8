"""What `cachekit compare` runs: a model and the solvers that sample from it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cachekit.demo.frechet import Features
from cachekit.errors import ConfigError


@dataclass(frozen=True)
class Solver:
    """One way to sample.

    Args:
        name: as the tables show it.
        sample: ``sample(seed, steps)`` returns the samples of one noise seed, shape (n, ...); every call with the same
            arguments starts from the same noise. It calls the model, wrapped or not, and knows nothing of caching.
        steps: number of steps of the full run; None where ``sample(seed)`` takes none, and no row has fewer steps.
    """

    name: str
    sample: Callable[..., Tensor]
    steps: int | None

    def run(self, seed: int, steps: int | None = None) -> Tensor:
        """The samples of a noise seed, with the full number of steps or another."""
        return self.sample(seed) if self.steps is None else self.sample(seed, self.steps if steps is None else steps)


@dataclass(frozen=True)
class Target:
    """A model with its solvers.

    Args:
        name: as the report shows it.
        model: what is wrapped.
        solvers: a table each. From the second on they are better ones, which stand in the first one's table as well.
        fine: ``fine(seed)`` returns a fine solution of the ODE that the solvers solve, from the same noise.
        real: features of real data, one kind or several, in which Frechet distances are measured.
        pixels: from samples (n, ...) to images (n, channels, height, width), or clips (n, channels, frames, height, width), in
            0 ... 1, for the pictures, PSNR and SSIM.
    """

    name: str
    model: nn.Module
    solvers: tuple[Solver, ...]
    fine: Callable[[int], Tensor] | None = None
    real: tuple[Features, ...] = ()
    pixels: Callable[[Tensor], Tensor] | None = None


def load_target(where: str, names: tuple[str, ...] = ()) -> Target:
    """The target that ``package.module:factory`` makes.

    The factory returns a ``Target``, or (model, sample) with ``sample(seed, steps=50)``: its default is the full number of
    steps. A module in the current folder is found.

    Args:
        where: the factory.
        names: of targets that need no factory, for the message.

    Raises:
        ConfigError: no such module or factory, or it returns something else.
    """
    module_name, _, attribute = where.partition(":")
    if not module_name or not attribute:
        known = f", or one of {', '.join(names)}" if names else ""
        raise ConfigError(f"target {where!r}: write package.module:factory, for example my_pipeline:target{known}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(f"target {where!r}: there is no module {error.name!r} here or among the installed ones") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(f"target {where!r}: {module_name} has no function {attribute!r}")
    return as_target(factory(), where)


def as_target(made: Any, name: str) -> Target:
    """What a factory returned, as a ``Target``.

    Raises:
        ConfigError: it is neither a ``Target`` nor (model, sample).
    """
    if isinstance(made, Target):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1]):
        return Target(name, made[0], (Solver("the sampler", made[1], _default_steps(made[1], name)),))
    raise ConfigError(
        f"target {name!r} returned {type(made).__name__}; return (model, sample), where model is the torch module to wrap and "
        "sample(seed, steps=50) returns a tensor, or a cachekit.demo.Target"
    )


def _default_steps(sample: Callable[..., Any], name: str) -> int | None:
    parameter = inspect.signature(sample).parameters.get("steps")
    if parameter is None:
        return None
    if not isinstance(parameter.default, int):
        raise ConfigError(f"target {name!r}: give steps a default in sample(seed, steps=50): the number of the full run")
    return parameter.default
