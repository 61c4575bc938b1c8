"""Read a model call: its timestep, its sample, and what conditions it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from cachekit.adapter import TIMESTEP_NAMES, Adapter
from cachekit.errors import ModelError
from cachekit.graph import Signature, signature
from cachekit.tree import Path, walk


@dataclass(frozen=True)
class Inputs:
    """One model call, read.

    Attributes:
        t: timestep in the scheduler's units; None where the batch mixes several.
        sample: the noisy sample; where an argument is a list of several, all of them, stacked or one behind the other in one row.
        conditioning: every other tensor with its path, but for the timestep and what is new at every step.
        key: signatures of all of them and the plain values (numbers, strings, flags) beside them.
        synchronised: whether reading t had to wait for a device.
    """

    t: float | None
    sample: Tensor | None
    conditioning: tuple[tuple[Path, Tensor], ...]
    key: tuple[tuple[Path, Signature | str], ...]
    synchronised: bool


class Reader:
    """Reads the calls of one ``forward`` by its parameters' names."""

    def __init__(self, forward: Callable[..., Any], adapter: Adapter) -> None:
        self.adapter = adapter
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(forward).parameters
        self.positional = [name for name, parameter in parameters.items() if parameter.kind in kinds]
        names = (adapter.timestep,) if adapter.timestep else TIMESTEP_NAMES
        self.timestep = next((name for name in names if name in parameters), names[0] if adapter.timestep else None)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """Take one call apart.

        Raises:
            ModelError: no timestep argument can be found in it.
        """
        named, name = self._named(args, kwargs)
        if name is None:
            raise ModelError(
                f"no timestep among the arguments {sorted(named)}; say which one it is: adapter=cachekit.Adapter(timestep='...')"
            )
        if named.get(name) is None:
            found = "is None" if name in named else f"is not among {sorted(named)}"
            raise ModelError(
                f"the timestep argument {name!r} {found}; pass it in every call, or name another one: "
                "adapter=cachekit.Adapter(timestep='...')"
            )
        t, synchronised = read_time(named.pop(name))
        sample, conditioning, key = self._conditioning(named)
        scaled = None if t is None else self.adapter.scheduler_time(t)
        return Inputs(scaled, sample, tuple(conditioning), tuple(key), synchronised)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Each argument by its name, and the name of the timestep."""
        named = {self.positional[k] if k < len(self.positional) else str(k): value for k, value in enumerate(args)}
        named.update(kwargs)
        return named, self.timestep or next((known for known in TIMESTEP_NAMES if known in named), None)

    def time(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
        """The timestep alone, in the scheduler's units; None where there is none, or several."""
        named, name = self._named(args, kwargs)
        t = None if name is None or named.get(name) is None else read_time(named[name])[0]
        return None if t is None else self.adapter.scheduler_time(t)

    def _conditioning(
        self, named: dict[str, Any]
    ) -> tuple[Tensor | None, list[tuple[Path, Tensor]], list[tuple[Path, Signature | str]]]:
        samples: list[Tensor] = []
        conditioning: list[tuple[Path, Tensor]] = []
        key: list[tuple[Path, Signature | str]] = []
        first: str | None = None
        order = sorted(named, key=lambda name: self.positional.index(name) if name in self.positional else len(self.positional))
        for name in order:
            if self.adapter.changes_per_step(name):
                continue
            for path, leaf in walk(named[name], (name,)):
                if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__"):
                    leaf = _read_array(leaf)
                if isinstance(leaf, Tensor):
                    key.append((path, signature(leaf)))
                    if not samples or (name == first and isinstance(named[name], list) and _alike(leaf, samples[0])):
                        samples, first = [*samples, leaf], name
                    else:
                        conditioning.append((path, leaf))
                elif isinstance(leaf, Number | str | bytes | Enum | torch.dtype | torch.device):
                    key.append((path, repr(leaf)))
        return _together(samples), conditioning, key


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether the two can be samples of one batch, of different sizes perhaps."""
    return a.is_floating_point() and a.ndim == b.ndim and a.shape[:1] == b.shape[:1] and (a.dtype, a.device) == (b.dtype, b.device)


def _together(samples: list[Tensor]) -> Tensor | None:
    if len(samples) < 2:
        return samples[0] if samples else None
    if len({sample.shape for sample in samples}) == 1:
        return torch.stack(samples)
    return torch.cat([sample.flatten() for sample in samples])[None]


def _read_array(leaf: Any) -> Any:
    """An array of another library as a tensor on its memory, a scalar of one as text; what holds no numbers as it is."""
    try:
        return torch.as_tensor(leaf, device="cpu") if getattr(leaf, "ndim", 0) else repr(leaf)
    except (TypeError, ValueError, RuntimeError):
        return leaf


def read_time(value: Any) -> tuple[float | None, bool]:
    """A timestep argument as one number, or None where it holds several; and whether a device had to be waited for.

    Raises:
        ModelError: it holds something else than numbers.
    """
    if isinstance(value, int | float):
        return float(value), False
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"the timestep argument is {value!r}, and no number, list, array or tensor of numbers; name another one: "
                "adapter=cachekit.Adapter(timestep='...')"
            ) from error
    # An expanded scalar, as pipelines pass it, is one number however large the batch.
    flat = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
    numbers = flat.reshape(-1).tolist()
    same = bool(numbers) and all(number == numbers[0] for number in numbers)
    return (float(numbers[0]) if same else None), value.device.type != "cpu"
