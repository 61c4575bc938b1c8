"""Which value vectors belong to the tokens of which module, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cachekit.decisions import Decisions
from cachekit.errors import ConfigError
from cachekit.graph import ModuleVisit, Visit
from cachekit.values import Measured, measures


def source(visit: Visit, module: ModuleVisit) -> tuple[int, int] | None:
    """Which value vectors belong to the tokens that a module takes: the number of the call in the visit, and which of its.

    Those that are as many; None where there are none, or several, so that nothing tells which.
    """
    tokens = module.inputs[0][1][0][:2]
    found = [(n, j) for n, other in enumerate(visit.modules) for j, shape in enumerate(other.values) if shape == tokens]
    return found[0] if len(found) == 1 else None


def _unknown(visit: Visit, module: ModuleVisit) -> ConfigError:
    """What to say where they are not known."""
    shown = [shape for other in visit.modules for shape in other.values]
    return ConfigError(
        f"module {module.name!r} of block {visit.block!r} takes tokens {module.inputs[0][1][0][:2]}, which are to be chosen by "
        f"their value vectors in self-attention, and of those there were seen {shown or 'none'} where one of that shape is needed; "
        "name the layer that makes them with adapter=cachekit.Adapter(values=('name within the attention',)) (code compiled "
        "with its attention hides it), choose tokens by something else, or leave the module out of the segment"
    )


def _chosen_by_values(decisions: Decisions, visit: Visit, owners: Sequence[int | None]) -> Iterator[tuple[int, ModuleVisit, Any]]:
    """The modules of a visit whose tokens a reuse chooses by value vectors: their call's number, and the reuse."""
    for m, (module, k) in enumerate(zip(visit.modules, owners, strict=True)):
        if k is not None and module.tokenwise and measures(decisions.sites[k].reuse):
            yield m, module, decisions.sites[k].reuse


def check_sources(decisions: Decisions, visit: Visit, owners: Sequence[int | None]) -> None:
    """Refuse to choose tokens by value vectors that were not seen.

    Args:
        owners: the segment of each of the visit's modules.

    Raises:
        ConfigError: of a module's tokens there are none, or nothing tells which.
    """
    for _, module, _ in _chosen_by_values(decisions, visit, owners):
        if source(visit, module) is None:
            raise _unknown(visit, module)


def remember(
    decisions: Decisions, visit: Visit, owners: Sequence[int | None], at: tuple[int, int], found: Sequence[Measured]
) -> None:
    """Keep what was made of the value vectors of one call, for the modules whose tokens they are.

    Args:
        at: number of the visit, and of the call in it.
    """
    for m, module, reuse in _chosen_by_values(decisions, visit, owners):
        place = source(visit, module)
        if place is not None and place[0] == at[1]:
            decisions.branch.measured[at[0], m] = found[place[1]][id(reuse)]
