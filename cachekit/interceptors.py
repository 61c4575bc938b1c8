"""The interceptors on a model and its blocks: put on, kept on, and taken out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from cachekit.adapter import Adapter
from cachekit.blocks import find_blocks
from cachekit.branch import Name
from cachekit.graph import Graph
from cachekit.inside import ATTENTION, CROSS, MLP, Role, find_modules
from cachekit.patch import Patch
from cachekit.peek import Peeker, intercept_look
from cachekit.under_way import UnderWay
from cachekit.values import Projection, projections

Original = Callable[..., Any]
# A module, the name of its method, what stands in for that, and what this is bound to.
Target = tuple[nn.Module, str, Callable[..., Any], tuple[Any, ...]]

COMPILED = "_compiled_call_impl"
# Where what torch.compile(block) returns keeps the block.
WITHIN = "_orig_mod"
WHOLE = "no block was seen running: compile the blocks (block.compile()), not the whole model; or use segments='model'"

HIDDEN = (
    "compiled blocks hide their modules, which all run: compile the modules (block.attn.compile()) in place of the blocks, or use "
    "segments of whole blocks"
)


class Intercepted(Protocol):
    """What the interceptors call."""

    model: nn.Module
    removed: bool
    peeker: Peeker
    under_way: UnderWay
    looks_inside: bool
    measures: bool

    def step(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def named(self, name: Name) -> AbstractContextManager[None]: ...

    def traced(self) -> None: ...


class Interceptors:
    """Those of one wrapped model."""

    def __init__(self) -> None:
        self.patches: list[Patch] = []
        self.kinds: dict[str, str] = {}
        self.roles: dict[tuple[str, str], Role] = {}
        self.hidden: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # torch leaves a module's compiled code out of its copies, so that nothing is there for these to lie on.
        return {**self.__dict__, "patches": [patch for patch in self.patches if patch.name != COMPILED]}

    def attach(self, engine: Intercepted, adapter: Adapter, modules: bool) -> None:
        """Put them on, also on blocks that came since or were compiled since, and where somebody's removal took them along.

        Args:
            modules: whether calls of modules within blocks must come by too.
        """
        targets: list[Target] = [(engine.model, "forward", intercept_model, (engine,))]
        if callable(getattr(engine.model, "cache_context", None)):
            targets.append((engine.model, "cache_context", intercept_context, (engine,)))
        for path, block in find_blocks(engine.model, adapter).items():
            self.kinds[path] = type(block).__name__
            targets.append((block, "forward", intercept_block, (engine, path)))
            if modules:
                targets += self._modules(engine, path, block, adapter)
            if engine.looks_inside:
                targets += [(module, "forward", intercept_look, (engine,)) for module in _modulated(path, block, adapter)]
        standing = {(id(patch.module), patch.name, patch.replacement.func) for patch in self.patches if patch.in_place}
        for module, name, function, bound in list(targets):
            # A compiled module is entered here; its forward would be traced, and the decision with it.
            if name == "forward" and getattr(module, COMPILED, None) is not None:
                targets.append((module, COMPILED, function, bound))
        for module, name, function, bound in targets:
            if (id(module), name, function) not in standing:
                self.patches.append(Patch(module, name, function, *bound))

    def _modules(self, engine: Intercepted, path: str, block: nn.Module, adapter: Adapter) -> Iterator[Target]:
        """A target for each module of a block, and for what is looked at within it, unless the block's compiled code hides them."""
        self.hidden.discard(path)
        if getattr(block, COMPILED, None) is not None:
            self.hidden.add(path)
            return
        for name, (module, role) in find_modules(path, block, adapter).items():
            self.roles[path, name] = role
            yield module, "forward", intercept_module, (engine, path, name)
            if engine.measures and role.kind == ATTENTION:
                for layer, projection in projections(module, adapter.values):
                    yield layer, "forward", intercept_values, (engine, path, name, projection)

    def notes(self, graph: Graph) -> set[str]:
        """A sentence for what keeps a graph's blocks or their modules from being sites."""
        found = {HIDDEN} if any(visit.block in self.hidden for visit in graph.visits) else set()
        found |= {
            f"module {module.name} of {visit.kind} writes into what it takes, so that it runs on every step"
            for visit in graph.visits
            for module in visit.modules
            if module.writes
        }
        return found | {
            f"a {visit.kind} changes something that it takes and doesn't return, so that it runs on every step"
            for visit in graph.visits
            if visit.writes
        }

    def eager(self, engine: Intercepted, path: str, original: Original) -> Original:
        """What to call for the code of the block at a path, given what its interceptor lies on: not what is compiled."""
        block = engine.model.get_submodule(path)
        within = block._modules.get(WITHIN)
        if within is not None:
            return within.forward
        if getattr(block, COMPILED, None) is None:
            return original
        return next((patch.original for patch in self.patches if patch.module is block and patch.name == "forward"), original)

    def detach(self) -> None:
        """Take them out. One that lies under somebody else's hook stays; the engine that it asks says that it is removed."""
        self.patches = [patch for patch in reversed(self.patches) if not patch.remove()]


def _modulated(path: str, block: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The modules in a block that take in its normed and modulated stream: those that the adapter names, else its attention."""
    if adapter.modulated:
        return [module for name, module in block.named_modules() if name.rpartition(".")[2] in adapter.modulated]
    return [module for module, role in find_modules(path, block, adapter).values() if role.kind not in (CROSS, MLP)]


def owner_of(module: nn.Module) -> Intercepted | None:
    """The engine whose interceptor lies on a module, under whatever other hooks."""
    found = module.__dict__.get("forward")
    while found is not None:
        ours = isinstance(found, functools.partial) and found.func in (intercept_model, intercept_block, intercept_module)
        if ours and not found.args[0].removed:
            engine: Intercepted = found.args[0]
            return engine
        found = getattr(found, "__wrapped__", None)
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_tracing(engine: Intercepted) -> None:
    """Runs while the model is traced, and is no part of the trace: what it changes must not be guarded."""
    engine.traced()


def intercept_model(engine: Intercepted, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a wrapped model's forward."""
    if torch.compiler.is_compiling():
        _note_tracing(engine)
        return original(*args, **kwargs)
    return engine.step(original, args, kwargs)


def intercept_block(engine: Intercepted, path: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of a block's forward, or before its compiled code."""
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    return engine.under_way.run_block(path, original, args, kwargs)


def intercept_module(engine: Intercepted, block: str, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of the forward of a module within a block, or before its compiled code."""
    if torch.compiler.is_compiling() or engine.peeker.peeking:
        return original(*args, **kwargs)
    return engine.under_way.run_module(block, name, original, args, kwargs)


def intercept_values(
    engine: Intercepted, block: str, name: str, projection: Projection, original: Original, *args: Any, **kwargs: Any
) -> Any:
    """Stands in the place of the forward of a layer that makes value vectors, within a module of a block."""
    result = original(*args, **kwargs)
    if not torch.compiler.is_compiling():
        engine.under_way.show(block, name, projection.values(result))
    return result


@contextmanager
def intercept_context(engine: Intercepted, original: Original, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in the place of a model's ``cache_context(name)``, with which pipelines name the branch."""
    with engine.named(Name(name)), original(name, *args, **kwargs):
        yield
