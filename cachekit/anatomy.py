"""Show a model's block graph: run it once, and measure what each block costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cachekit.adapter import Adapter, adapter_for
from cachekit.blocks import find_blocks
from cachekit.errors import ModelError
from cachekit.graph import Cost, Graph, signature
from cachekit.inside import Role, find_modules
from cachekit.module_watch import ModuleWatch
from cachekit.patch import Patch
from cachekit.tree import tensors
from cachekit.watch import Watch


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of QK^T and AV from the shapes (batch, heads, tokens, width) of q, k and v."""
    batch, heads, queries, width = q
    return int(2 * batch * heads * queries * k[2] * (width + v[3]))


# torch's counter knows the attention kernels of GPUs only, so that QK^T and AV would count as nothing on a CPU.
_KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


class _Recorder:
    def __init__(self, adapter: Adapter) -> None:
        self.watch = Watch(adapter)
        self.modules = ModuleWatch()
        self._busy = False
        self.costs: list[Cost] = []

    def visit(
        self, path: str, block: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.watch.before(path, type(block).__name__, args, kwargs)
        with FlopCounterMode(display=False, custom_mapping=_KERNELS) as counter:
            result = original(*args, **kwargs)
        parameters = sum(parameter.numel() for parameter in block.parameters())
        self.costs.append(Cost(parameters, counter.get_total_flops()))
        self.watch.after(result)
        return result

    def module(self, at: tuple[str, str, Role], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path, name, role = at
        v = len(self.watch.seen) - 1
        if self._busy or v < 0 or self.watch.seen[v].block != path:
            return original(*args, **kwargs)
        self._busy = True
        try:
            return self.modules.call(v, name, role, original, args, kwargs)[0]
        finally:
            self._busy = False


def _record_module(recorder: _Recorder, at: tuple[str, str, Role], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return recorder.module(at, original, args, kwargs)


@contextmanager
def _modules_patched(model: nn.Module, adapter: Adapter, recorder: _Recorder) -> Iterator[None]:
    patches = [
        Patch(module, "forward", _record_module, recorder, (path, name, role))
        for path, block in find_blocks(model, adapter).items()
        for name, (module, role) in find_modules(path, block, adapter).items()
    ]
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.remove()


def _record(recorder: _Recorder, path: str, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return recorder.visit(path, block, original, args, kwargs)


@contextmanager
def blocks_patched(model: nn.Module, adapter: Adapter, function: Callable[..., Any], shared: Any) -> Iterator[None]:
    """Every candidate block's calls go to ``function(shared, path, block, original, *args, **kwargs)``."""
    patches = [Patch(block, "forward", function, shared, path, block) for path, block in find_blocks(model, adapter).items()]
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.remove()


def graph(model: nn.Module, *inputs: Any, adapter: Adapter | str | None = None, **kwargs: Any) -> Graph:
    """Run a model once and return the graph of its blocks.

    Args:
        model: any module; a wrapped one shows the same graph, and its cache is left alone.
        inputs, kwargs: the arguments of one call of it.
        adapter: as in ``wrap``.

    Returns:
        Blocks in the order of their calls, chains, long skip connections, parameters and FLOPs. Print it to read it.

    Raises:
        ModelError: not a module, or no block was called.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no torch.nn.Module; give the transformer itself, for example pipe.transformer")
    facts = adapter_for(model, adapter)
    recorder = _Recorder(facts)
    handle = model.__dict__.get("cachekit")
    with ExitStack() as stack:
        stack.enter_context(blocks_patched(model, facts, _record, recorder))
        stack.enter_context(_modules_patched(model, facts, recorder))
        stack.enter_context(torch.no_grad())
        if handle is not None:
            stack.enter_context(handle._engine.lanes.disabled(aside=True))
        result = model(*inputs, **kwargs)
    found = recorder.modules.onto(recorder.watch.graph())
    if not found.visits:
        raise ModelError(
            f"no block of {type(model).__name__} was called: they stand in no ModuleList or Sequential, or it is compiled whole"
        )
    prediction = tuple(signature(tensor) for _, tensor in tensors(result))
    return replace(found, costs=tuple(recorder.costs), unit=facts.unit, prediction=prediction)
