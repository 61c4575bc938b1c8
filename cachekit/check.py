"""Check on the user's own model, block by block, that reuse is as exact as it claims to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cachekit.adapter import Adapter, adapter_for
from cachekit.anatomy import blocks_patched, graph
from cachekit.errors import ModelError
from cachekit.findings import Finding, Report, close, copied, equal, leaves
from cachekit.policies import every, first
from cachekit.wrap import Handle, unwrap, wrap


def check(model: nn.Module, *inputs: Any, adapter: Adapter | str | None = None, **kwargs: Any) -> Report:
    """Run the exactness properties on a model with the arguments of one call.

    Each block, called twice with the same inputs, must return the same. For the whole stack and for each block (or unit of
    blocks) alone: a step whose inputs equal the stored step's gives the same output, bit for bit with the stored output and
    within rounding with the residual, and the blocks do not run. Where two uncached calls already disagree, the blocks that do
    are named, and nothing else is tried.

    Args:
        model: any module that is not wrapped yet; it is checked in evaluation mode, and left as it was.
        inputs, kwargs: the arguments of one call of it; every call gets copies of their tensors.
        adapter: as in ``wrap``.

    Raises:
        ModelError: not a module, the model is wrapped, or no block of it is called.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no torch.nn.Module; give the transformer itself, for example pipe.transformer")
    if "cachekit" in model.__dict__:
        raise ModelError("the model is wrapped; cachekit.unwrap(model) first, check() wraps it in its own ways")
    subject = _Subject(model, adapter_for(model, adapter), inputs, kwargs)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return Report(tuple(_findings(subject)))
    finally:
        unwrap(model)
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class _Subject:
    """A model and the arguments of the call that is made of it over and over."""

    model: nn.Module
    adapter: Adapter
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self) -> list[Tensor]:
        """The tensors that a call returns. A model may write into its inputs: it gets copies."""
        return leaves(self.model(*copied(self.args), **copied(self.kwargs)))

    def attributes(self) -> dict[tuple[str, str], Any]:
        """What stands in every module's ``__dict__``, but for its mode."""
        found = {(name, key): value for name, module in self.model.named_modules() for key, value in module.__dict__.items()}
        return {(name, key): value for (name, key), value in found.items() if key != "training"}


def _findings(subject: _Subject) -> Iterator[Finding]:
    units = len(graph(subject.model, *copied(subject.args), adapter=subject.adapter, **copied(subject.kwargs)).blocks)
    expected = subject.call()
    first_left = subject.attributes()
    agree = equal("model", "two uncached calls agree", expected, subject.call())
    yield agree
    yield from _called_twice(subject)
    if not agree.holds:
        return
    before = subject.attributes()
    # What the model itself leaves behind at each call, it may also leave behind while it is wrapped.
    own = {key for key in before if key not in first_left or first_left[key] is not before[key]}
    wrap(subject.model, every(1), adapter=subject.adapter)
    with _one_branch(subject.model):
        yield equal("model", "every(1) equals the uncached model", expected, subject.call())
    one = "block" if subject.adapter.unit == 1 else "unit"
    sites: list[tuple[str, Any]] = [("model", "model"), ("all blocks", "all")]
    sites += [(f"{one} {u}", (u, u + 1)) for u in range(units // subject.adapter.unit)]
    for name, segments in sites:
        for reuse in ("output", "residual"):
            if not (name == "model" and reuse == "residual"):
                yield from _reused(subject, name, segments, reuse, expected)
    unwrap(subject.model)
    after = subject.attributes()
    same = [key for key in after if key not in own] == [key for key in before if key not in own]
    same = same and all(after[key] is before[key] for key in before if key not in own)
    yield Finding("model", "unwrap restores every __dict__", same, "as it was" if same else "something stayed behind")


def _called_twice(subject: _Subject) -> Iterator[Finding]:
    """One finding for each block: whether it returns the same for the same inputs."""
    found: list[tuple[str, Finding]] = []
    with blocks_patched(subject.model, subject.adapter, _twice, found):
        subject.call()
    unit, one = subject.adapter.unit, "block" if subject.adapter.unit == 1 else "unit"
    for k, (path, finding) in enumerate(found):
        yield replace(finding, site=f"{one} {k // unit}", claim=f"called twice, {path} returns the same")


def _twice(
    found: list[tuple[str, Finding]], path: str, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    again = copied(args), copied(kwargs)
    result = original(*args, **kwargs)
    expected = leaves(result)
    found.append((path, equal("", "", expected, leaves(original(*again[0], **again[1])))))
    return result


def _reused(subject: _Subject, name: str, segments: Any, reuse: str, expected: list[Tensor]) -> Iterator[Finding]:
    model = wrap(subject.model, first(1), segments=segments, reuse=reuse, adapter=subject.adapter)
    with _one_branch(model):
        yield equal(name, f"{reuse}: the first step equals the uncached model", expected, subject.call())
        reused = subject.call()
        record = _handle(model).stats.records[-1].recomputed
    ran = sum(record)
    yield Finding(
        name,
        f"{reuse}: its blocks do not run on a reused step",
        ran < len(record),
        f"{ran} of {len(record)} blocks ran",
    )
    claim = f"{reuse}: a reused step with equal inputs equals the stored one"
    if reuse == "output":
        yield equal(name, claim, expected, reused)
    else:
        yield close(name, claim, expected, reused, len(record))


def _handle(model: nn.Module) -> Handle:
    handle: Handle = model.__dict__["cachekit"]
    return handle


@contextmanager
def _one_branch(model: nn.Module) -> Iterator[None]:
    # In a named branch of an explicit session the same inputs again are a further step, not another branch.
    with _handle(model).session(), _handle(model).branch("check"):
        yield
