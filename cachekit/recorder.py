"""Keep what sites returned at every step of a generation, with no say in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.blocks import find_blocks
from cachekit.errors import ConfigError, ModelError
from cachekit.inside import CROSS, MLP, find_modules
from cachekit.patch import Patch
from cachekit.policy import Policy, Step
from cachekit.tree import Path, arguments

# Branch, segment, visit, path in the visit's result.
Where = tuple[int, int, int, Path]


class Listening(Policy[tuple[tuple[float, float], ...]]):
    """Recomputes everything, and remembers ``change`` and ``front_change`` from each step to the next."""

    needs: ClassVar[frozenset[Any]] = frozenset({"probe", "front"})

    def init(self) -> tuple[tuple[float, float], ...]:
        return ()

    def decide(self, state: tuple[tuple[float, float], ...], step: Step) -> bool:
        return True

    def update(self, state: tuple[tuple[float, float], ...], step: Step, recomputed: bool) -> tuple[tuple[float, float], ...]:
        return (*state, (step.change, step.front_change) if step.i else (float("nan"), float("nan")))


@dataclass
class Recording:
    """What a generation showed; lists have an entry for each different timestep.

    Attributes:
        timesteps: of each branch.
        values: what each stored tensor was.
        entering: of each branch, what entered the first block's attention.
        states: of each branch, the state of each segment's policy at the end.
    """

    timesteps: dict[int, list[float]] = field(default_factory=dict)
    values: dict[Where, list[Tensor]] = field(default_factory=dict)
    entering: dict[int, list[Tensor]] = field(default_factory=dict)
    states: dict[int, list[Any]] = field(default_factory=dict)

    def of_segment(self, k: int) -> list[list[Tensor]]:
        """The values of every tensor that a segment stores."""
        return [values for (_, segment, _, _), values in self.values.items() if segment == k]

    def check(self) -> tuple[float, ...]:
        """The generation's timesteps.

        Raises:
            ConfigError: nothing was recorded, or branches were at different timesteps.
            ModelError: something was not to be seen at every step.
        """
        if not self.timesteps:
            raise ConfigError(
                "no step of the model was seen: sample(run) must call the model that is calibrated, with one timestep for the "
                "whole batch, and return when the generation is over"
            )
        grids = {tuple(times) for times in self.timesteps.values()}
        if len(grids) > 1:
            raise ConfigError("the branches of classifier-free guidance are at different timesteps; guide every step, or none")
        (times,) = grids
        if any(len(values) != len(times) for values in self.values.values()):
            raise ModelError("a value of some site was not to be seen at every step: the model's calls differ; name other sites")
        return times


class Recorder:
    """Looks at a wrapped model's store after each of its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.engine = model.__dict__["cachekit"]._engine
        self.found = Recording()
        self.entered: Tensor | None = None
        self._seen: dict[int, int] = {}

    def note(self) -> None:
        """A call is over: keep what it stored. A second evaluation at one timestep replaces the first, as in the store."""
        generation = self.engine.lanes.current.generation
        for b, branch in enumerate(generation.branches if generation is not None else ()):
            if self._seen.get(b) == branch.i:
                continue
            self._seen[b] = branch.i
            _put(self.found.timesteps.setdefault(b, []), branch.node, branch.t)
            for (k, v, path), history in branch.store.items():
                if history.entries[0][1].is_floating_point():
                    _put(self.found.values.setdefault((b, k, v, path), []), branch.node, history.entries[0][1])
            if self.entered is not None:
                _put(self.found.entering.setdefault(b, []), branch.node, self.entered)
            self.found.states[b] = list(branch.states)
        self.entered = None


def _put(found: list[Any], node: int, value: Any) -> None:
    found[node:] = [value]


def _after_call(recorder: Recorder, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    recorder.note()
    return result


def _before_attention(recorder: Recorder, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    taken = arguments(args, kwargs)
    if recorder.entered is None and taken:
        recorder.entered = taken[0][1].detach().clone()
    return original(*args, **kwargs)


def _first_attention(model: nn.Module, adapter: Adapter) -> nn.Module | None:
    for path, block in find_blocks(model, adapter).items():
        for module, role in find_modules(path, block, adapter).values():
            if role.kind not in (CROSS, MLP):
                return module
    return None


@contextmanager
def recording(model: nn.Module, adapter: Adapter | str | None, *, attention: bool = False) -> Iterator[Recording]:
    """Record what a wrapped model stores in one generation.

    Args:
        model: wrapped with reuses whose axis is the grid, so that every step is stored.
        adapter: as in ``wrap``.
        attention: whether what enters the first attention is recorded as well.
    """
    recorder = Recorder(model)
    first = _first_attention(model, adapter_for(model, adapter)) if attention else None
    with ExitStack() as stack:
        stack.callback(Patch(model, "forward", _after_call, recorder).remove)
        if first is not None:
            stack.callback(Patch(first, "forward", _before_attention, recorder).remove)
        yield recorder.found
