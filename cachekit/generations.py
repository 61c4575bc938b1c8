"""Run a user's sampler under a policy, and compare what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.adapter import Adapter
from cachekit.errors import ConfigError
from cachekit.measures import Matrix
from cachekit.tree import tensors
from cachekit.wrap import unwrap, wrap

# sample(run) runs one whole generation of a numbered run, and returns its final sample.
Sample = Callable[[int], Any]


@dataclass(frozen=True)
class Outcome:
    """A generation: its final samples, (batch, values) in double precision, its seconds, and the share of blocks that ran."""

    sample: Tensor
    seconds: float
    blocks: float


@dataclass(frozen=True)
class Sampler:
    """A model with what samples from it.

    Args:
        model: called by ``sample``; wrapped while something runs, and unwrapped afterwards.
        sample: runs a numbered run from its noise to its sample: the same for the same number.
        adapter: as in ``wrap``.
    """

    model: nn.Module
    sample: Sample
    adapter: Adapter | str | None = None

    def wrap(self, policy: Any, segments: Any = None, reuse: Any = None) -> None:
        """Wrap the model, for ``call``."""
        wrap(self.model, policy, segments=segments, reuse=reuse, adapter=self.adapter)

    def unwrap(self) -> None:
        """Take the cache off again."""
        unwrap(self.model)

    def call(self, run: int) -> Outcome:
        """Run one generation under what the model is wrapped with.

        Raises:
            ConfigError: it returned no tensor, or was not one generation.
        """
        handle: Any = self.model.__dict__["cachekit"]
        handle.reset()
        begun = time.perf_counter()
        with torch.no_grad():
            result = self.sample(run)
        seconds = time.perf_counter() - begun
        found = [tensor.detach().double() for _, tensor in tensors(result) if tensor.is_floating_point()]
        if not found:
            raise ConfigError(
                f"sample({run}) returned {type(result).__name__}; return the final sample as a tensor (of latents, say)"
            )
        stats = handle.stats
        if stats.generations != 1:
            raise ConfigError(
                f"sample({run}) began {stats.generations} generations; run one from its noise to its sample, with this model, "
                "within model.cachekit.session(steps=...) where the samples could be taken for several"
            )
        return Outcome(_rows(found), seconds, stats.blocks_run / stats.blocks_total if stats.blocks_total else 1.0)


def _rows(found: list[Tensor]) -> Tensor:
    """A row for each sample of the batch; a single one where no batch is to be seen."""
    batch = len(found[0]) if found[0].ndim > 1 else 0
    if not batch or any(tensor.ndim < 2 or len(tensor) != batch for tensor in found):
        return torch.cat([tensor.flatten() for tensor in found])[None]
    return torch.cat([tensor.flatten(1) for tensor in found], 1)


def relative(x: Tensor, full: Tensor) -> Tensor:
    """(x - full) / |full|, (batch, values); its norm is the relative error.

    Raises:
        ConfigError: they have different sizes, or the full one is nothing to compare with.
    """
    if x.shape != full.shape:
        raise ConfigError(
            f"two calls of one run returned batch and values of {tuple(full.shape)} and {tuple(x.shape)}; sample(run) must depend "
            "on its run alone"
        )
    norm = torch.linalg.vector_norm(full)
    if not bool(torch.isfinite(norm)) or float(norm) == 0.0:
        raise ConfigError(
            "the uncached sample is zero or not finite, so that no error is relative to it; see that sample(run) works"
        )
    found: Tensor = (x - full) / norm
    return found


def sample_errors(difference: Tensor) -> Matrix:
    """The errors of a batch's samples, relative to the mean square of the full ones, (batch,); infinite where one ran away.

    Args:
        difference: of ``relative``.
    """
    norms = torch.linalg.vector_norm(difference, dim=1) * len(difference) ** 0.5
    found: Matrix = norms.nan_to_num(nan=torch.inf, posinf=torch.inf).cpu().numpy()
    return found


def check_runs(runs: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of runs, as a count or a list.

    Raises:
        ConfigError: there is none, or one twice.
    """
    found = tuple(range(runs)) if isinstance(runs, int) else tuple(runs)
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"runs={runs!r}: give how many there are, at least one, or their numbers, each once")
    return found


def check_sites(sites: Sequence[Any]) -> tuple[Any, ...]:
    """Sites, as a list.

    Raises:
        ConfigError: there is none, or the name of one stands alone.
    """
    if isinstance(sites, str):
        raise ConfigError(f"sites={sites!r}: give a list of them, sites=({sites!r},)")
    if not sites:
        raise ConfigError("sites=(): give at least one, such as sites=('model',)")
    return tuple(sites)
