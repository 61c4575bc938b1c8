"""A preset that depends on the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from cachekit.adapter import Adapter
from cachekit.errors import ConfigError
from cachekit.policy import Policy, Step
from cachekit.preset import Preset

T = TypeVar("T")

NEEDS_MODEL = (
    "this policy depends on the model that it is for, and there is none here; give it what it takes from the model "
    "(see its docstring), or ask wrap"
)


class _Unbound(Policy[Any]):
    """Stands for the policy while the model is not known."""

    def init(self) -> Any:
        raise ConfigError(NEEDS_MODEL)

    def decide(self, state: Any, step: Step) -> bool:
        raise ConfigError(NEEDS_MODEL)


@dataclass(frozen=True)
class ForModel(Preset):
    """What a maker returns whose preset depends on the model: published ratios of a family, a calibration's file.

    Override ``for_model``; ``wrap`` asks it once the model and its adapter are known. Until then its policy is none that could
    be asked: ``plan`` raises. Joined with policies and presets by ``|`` and ``&`` it is another one.
    """

    policy: Policy[Any] = field(default_factory=_Unbound, init=False, repr=False, compare=False)
    segments: Any = field(default=None, init=False, repr=False, compare=False)
    reuse: Any = field(default=None, init=False, repr=False, compare=False)

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        """The preset for this model.

        Args:
            model: as it was given to ``wrap``, not wrapped yet.
            adapter: the facts about it that are in use.

        Raises:
            ConfigError: the model is not one that this knows of; the message says what to write instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must define for_model(self, model, adapter) -> cachekit.Preset")

    def __or__(self, other: Any) -> Preset:
        return _joined(self, other, operator.or_)

    def __ror__(self, other: Any) -> Preset:
        return _joined(other, self, operator.or_)

    def __and__(self, other: Any) -> Preset:
        return _joined(self, other, operator.and_)

    def __rand__(self, other: Any) -> Preset:
        return _joined(other, self, operator.and_)


@dataclass(frozen=True)
class _Joined(ForModel):
    """Two presets of which at least one depends on the model, joined once it is known."""

    a: Preset | Policy[Any]
    b: Preset | Policy[Any]
    join: Callable[[Any, Any], Preset]

    def for_model(self, model: nn.Module, adapter: Adapter) -> Preset:
        return self.join(_bound(self.a, model, adapter), _bound(self.b, model, adapter))


def _joined(a: Any, b: Any, join: Callable[[Any, Any], Any]) -> Preset:
    if not isinstance(a, Preset | Policy) or not isinstance(b, Preset | Policy):
        return NotImplemented  # type: ignore[no-any-return]
    return _Joined(a, b, join)


def _bound(part: Preset | Policy[Any], model: nn.Module, adapter: Adapter) -> Preset | Policy[Any]:
    return part.for_model(model, adapter) if isinstance(part, ForModel) else part


def bound(preset: Preset, model: nn.Module, adapter: Adapter) -> Preset:
    """The preset for this model: itself where it doesn't depend on it.

    Raises:
        ConfigError: as ``ForModel.for_model``.
    """
    return preset.for_model(model, adapter) if isinstance(preset, ForModel) else preset


def by_class(model: nn.Module, known: Mapping[str, T]) -> T | None:
    """What is known of a model by its class name, searched along its class hierarchy as adapters are; None where nothing is."""
    return next((known[base.__name__] for base in type(model).__mro__ if base.__name__ in known), None)
