"""The rows of a comparison, and how a policy is written on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cachekit.demo.target import Solver, Target
from cachekit.errors import ConfigError
from cachekit.preset import settled
from cachekit.reuse import parse_reuse
from cachekit.segments import parse_segments
from cachekit.spec import parse_policy

# What the default comparison shows: the preset on the middle and on the whole prediction, the same held, a combination without
# warm-up and tail (which a grid that is even in the log-SNR needs less), and a threshold.
POLICIES = (
    *(f"skip-every-{n}{where}{how}" for where in ("", "@model") for how in ("", "/output") for n in (2, 3, 4)),
    "at-most-1 & moved-0.5@model/grid-taylor-2",
    "change-0.15",
)

# Of the plain model, beside a Skip-DiT that is shown in full.
BESIDE = ("skip-every-2", "skip-every-2@model")

# A file in a spec, up to its ending or to the end of the policy that it belongs to.
_FILE = re.compile(r"[^\s|&()]*\.json|:[^\s|&()]*")
_LISTED = re.compile(r"(?:[^,:]|:(?:[^\s:=|&()]*?\.json)?)+")

# Of the full number of steps. The error at any time between them is interpolated, so that they stand densely where caches do.
SHARES = (0.8, 0.66, 0.58, 0.5, 0.42, 0.34)
SHARES_BETTER = (0.66, 0.5, 0.34)


@dataclass(frozen=True)
class Row:
    """One way to sample.

    Attributes:
        label: as the table shows it.
        kind: ``"uncached"``, ``"fewer"`` (fewer steps of the same solver), ``"better"`` (a better solver) or ``"cached"``.
        solver: what samples.
        steps: number of steps; None for a solver that takes none.
        policy, segments, reuse: as in ``wrap``, for cached rows.
    """

    label: str
    kind: str
    solver: Solver
    steps: int | None
    policy: str = ""
    segments: Any = None
    reuse: Any = None


def split_policies(text: str) -> list[str]:
    """What commas separate. Those between a colon and the next ``.json`` are a file's, and separate nothing."""
    return [match.group() for match in _LISTED.finditer(text)]


def parse_cached(text: str, solver: Solver) -> Row:
    """``POLICY[@SEGMENTS][/REUSE]``, such as ``"skip-every-2@model"`` or ``"plan:/tmp/plan.json@model/taylor-1"``.

    A file's name may hold ``@`` and ``/``: it ends with ``.json``, or else with the policy, which nothing can follow then.

    Raises:
        ConfigError: one of the three can't be read, or two presets disagree on what is not given.
    """
    end = max((match.end() for match in _FILE.finditer(text)), default=0)
    rest, _, reuse = text[end:].partition("/")
    policy, _, segments = rest.partition("@")
    policy, segments, reuse = (text[:end] + policy).strip(), segments.strip(), reuse.strip()
    if not policy:
        raise ConfigError(f"{text!r} names no policy; write POLICY[@SEGMENTS][/REUSE], for example skip-every-2@model/taylor-1")
    preset = parse_policy(policy)
    parse_segments(segments or settled(preset.segments))
    parse_reuse(reuse or settled(preset.reuse) or "output")
    return Row(text, "cached", solver, solver.steps, policy, segments or None, reuse or None)


def rows_for(target: Target, solver: Solver, policies: tuple[str, ...], fewer: bool = True) -> list[Row]:
    """All rows of one solver's table, the uncached one first; it is the only one of a target without policies."""
    rows = [Row("uncached", "uncached", solver, solver.steps)]
    if fewer and policies and solver.steps is not None:
        counts = sorted({max(1, round(share * solver.steps)) for share in SHARES} - {solver.steps}, reverse=True)
        rows += [Row(f"{steps} steps", "fewer", solver, steps) for steps in counts]
        for better in target.solvers[1:] if solver.name == target.solvers[0].name else ():
            counts = [max(1, round(share * solver.steps)) for share in SHARES_BETTER]
            rows += [Row(f"{better.name}, {steps} steps", "better", better, steps) for steps in counts]
    return rows + [parse_cached(text, solver) for text in policies]


def rows_of(names: Sequence[str], policies: Sequence[str]) -> list[tuple[str, ...]]:
    """The policies of each target: those without a name, and those behind its own, as in ``"skip-dit=skip-every-2@skip-1"``.

    Raises:
        ConfigError: a policy for a target that is not compared, or the same target twice.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"targets {', '.join(names)}: give each once")
    found: list[list[str]] = [[] for _ in names]
    for text in policies:
        name, policy = _owner(names, text)
        for k, target in enumerate(names):
            if name is None or target == name:
                found[k].append(policy)
    return [tuple(rows) for rows in found]


def _owner(names: Sequence[str], text: str) -> tuple[str | None, str]:
    """The target that a policy is for, and the policy. Behind a colon ``=`` belongs to a file, unless a target is so called."""
    for k in (k for k, letter in enumerate(text) if letter == "="):
        if text[:k].strip() in names:
            return text[:k].strip(), text[k + 1 :]
    name, equals, _ = text.partition("=")
    if equals and ":" not in name:
        raise ConfigError(f"{text!r} is for a target {name.strip()!r}; there are {', '.join(names)}")
    return None, text
