"""Policies and reuses as text: "skip-every-2", "N2-700-50", "every-2 | outside-700-50"; "taylor-2"."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from cachekit.errors import ConfigError
from cachekit.policy import Policy
from cachekit.preset import Preset

_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
_LEAF = re.compile(rf"(?P<name>[A-Za-z][A-Za-z0-9-]*?)-?(?P<numbers>{_NUMBER}(?:-{_NUMBER})*)?")
# Behind a colon stands a file's name, which may have blanks in it.
_TOKEN = re.compile(r"\s*([|&()]|[^|&()\s:]+:[^|&()]*[^|&()\s]|[^|&()\s]+)")


# Entry points are loaded when they are asked for by name, so that a broken package breaks nothing else.
Known = Mapping[str, Callable[..., Any] | EntryPoint]


def known_policies() -> Known:
    """Name in a spec string -> what makes the policy: cachekit's own, and those of entry points ``cachekit.policies``."""
    from cachekit.policies import POLICIES

    return {**POLICIES, **{entry.name: entry for entry in entry_points(group="cachekit.policies")}}


def known_reuses() -> Known:
    """Name in a spec string -> what makes the reuse: cachekit's own, and those of entry points ``cachekit.reuses``."""
    from cachekit.policies.reuses import REUSES

    return {**REUSES, **{entry.name: entry for entry in entry_points(group="cachekit.reuses")}}


def _load(name: str, found: Callable[..., Any] | EntryPoint) -> Callable[..., Any]:
    if not isinstance(found, EntryPoint):
        return found
    try:
        maker: Callable[..., Any] = found.load()
    except Exception as error:
        raise ConfigError(f"{name!r} of another package can't be loaded from {found.value}: {error}; mend it") from error
    return maker


def parse_policy(policy: Any) -> Preset:
    """A spec string, a policy, a preset or a plan, as a preset.

    In a string, ``&`` binds closer than ``|``, as in Python; parentheses group. ``"plan.json"`` and ``"plan:FILE"`` are a plan,
    ``"NAME-NUMBERS:FILE"`` is fitted to a calibration.

    Raises:
        ConfigError: an unknown name (known ones are listed), numbers that a policy refuses, or something else altogether.
    """
    from cachekit.plan_file import FromPlan, Plan

    if isinstance(policy, Preset):
        return policy
    if isinstance(policy, Policy):
        return Preset(policy)
    if isinstance(policy, Plan):
        return FromPlan(policy)
    if not isinstance(policy, str):
        raise ConfigError(f"policy={policy!r} is neither a spec string such as 'skip-every-2' nor a cachekit.Policy or Plan")
    tokens = _TOKEN.findall(policy)
    parser = _Parser(tokens, policy, known_policies())
    result = parser.either()
    if parser.tokens:
        raise ConfigError(f"can't read {policy!r} from {parser.tokens[0]!r} on; join policies with | or &")
    return result if isinstance(result, Preset) else Preset(result)


class _Parser:
    """Recursive descent over ``either := both ('|' both)*``, ``both := leaf ('&' leaf)*``."""

    def __init__(self, tokens: list[str], text: str, known: Known) -> None:
        self.tokens, self.text, self.known = tokens, text, known

    def _take(self, token: str) -> bool:
        if self.tokens and self.tokens[0] == token:
            self.tokens.pop(0)
            return True
        return False

    def either(self) -> Any:
        result = self.both()
        while self._take("|"):
            result = result | self.both()
        return result

    def both(self) -> Any:
        result = self.leaf()
        while self._take("&"):
            result = result & self.leaf()
        return result

    def leaf(self) -> Any:
        if self._take("("):
            result = self.either()
            if not self._take(")"):
                raise ConfigError(f"{self.text!r} lacks a closing parenthesis")
            return result
        if not self.tokens or self.tokens[0] in "|&)":
            raise ConfigError(f"{self.text!r} lacks a policy; write for example 'every-2 | outside-700-50'")
        leaf = self.tokens.pop(0)
        if ":" in leaf or leaf.endswith(".json"):
            return _from_file(leaf)
        from cachekit.policies.calibrated import CALIBRATED

        match = _LEAF.fullmatch(leaf)
        if match is not None and match["name"] in CALIBRATED and match["name"] not in self.known:
            raise ConfigError(_lacks_file(leaf, match["name"]))
        written = ", ".join(file_usage(name, maker) for name, maker in CALIBRATED.items())
        return make(leaf, self.known, kind="policy", advice=f"from a file: {written}; join them with | or &")


def _lacks_file(leaf: str, name: str) -> str:
    needs, made = ("file", "cachekit.search(...).best") if name == "plan" else ("calibration", "cachekit.calibrate(...)")
    return f"{leaf} needs a {needs}: write {leaf}:FILE with the file of {made}.save(FILE)"


def _from_file(leaf: str) -> Any:
    """``plan.json``, ``plan:FILE`` or ``NAME-NUMBERS:FILE``."""
    from cachekit.policies.calibrated import CALIBRATED

    named, colon, file = leaf.partition(":")
    if not colon:
        named, file = "plan", leaf
    if not file:
        raise ConfigError(f"{leaf!r} names no file; write for example 'plan:plan.json' or 'change-percentile-30:calibration.json'")
    makers = {name: functools.partial(maker, file) for name, maker in CALIBRATED.items()}
    return make(named, makers, kind="policy from a file", advice="what takes no file goes without a colon")


def make(leaf: str, known: Known, *, kind: str, advice: str) -> Any:
    """One policy or reuse from its spec, such as ``"every-2"`` or ``"taylor-2"``.

    Args:
        leaf: a name and the numbers that its maker is given by position.
        known: names and makers.
        kind, advice: what is made, and what to write instead where the name is unknown.

    Raises:
        ConfigError: as ``parse_policy``.
    """
    match = _LEAF.fullmatch(leaf)
    if match is None or match["name"] not in known:
        listed = ", ".join(sorted(usage(name, found) for name, found in known.items()))
        raise ConfigError(f"unknown {kind} {leaf!r}; known: {listed}; {advice}")
    maker = _load(match["name"], known[match["name"]])
    found = re.findall(_NUMBER, match["numbers"] or "")
    numbers = [float(number) if "." in number or "e" in number else int(number) for number in found]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{leaf!r}: a number in it is beyond all that can be counted with; write a smaller one")
    try:
        return maker(*numbers)
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{leaf!r} does not fit {usage(match['name'], maker)}: {error}") from error


def usage(name: str, found: Callable[..., Any] | EntryPoint) -> str:
    """How a spec of this name is written, such as ``"outside-START-CLOSE"``."""
    try:
        given = inspect.signature(_load(name, found)).parameters.values()
    except ConfigError:
        return f"{name} (can't be loaded)"
    names = [parameter.name.upper() for parameter in given if parameter.kind is not parameter.KEYWORD_ONLY]
    return "-".join([name, *names]) if name != "N" else f"N{'-'.join(names)}"


def file_usage(name: str, maker: Callable[..., Any]) -> str:
    """How a spec of this name is written that takes a file, such as ``"change-percentile-P:FILE"``."""
    return f"{usage(name, functools.partial(maker, ''))}:FILE"


def summary(name: str, found: Callable[..., Any] | EntryPoint) -> str:
    """The first paragraph of the docstring of what makes it, on one line; why it can't be loaded where it can't."""
    try:
        text = inspect.getdoc(_load(name, found)) or ""
    except ConfigError as error:
        return str(error)
    return " ".join(text.split("\n\n")[0].split()).replace("``", "")
