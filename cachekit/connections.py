"""Carry an early block's output to a late block, within one model call.

torch runs a module's hooks outside of its ``forward``, which is where a cache intercepts. So the early block's hook sees what
the model gets, reused or not, the late block's hook passes that very tensor on as one more argument, and the cache between the
two sees a long skip connection by identity, as it sees a model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling as compiling

from cachekit.captured import Calls, Captured, Passed
from cachekit.errors import ModelError
from cachekit.main_stream import Main, main_input, main_output, swapped, with_input
from cachekit.patch import Patch

ARGUMENT = "long_skip"


@dataclass(frozen=True)
class Connection:
    """One long skip connection.

    Attributes:
        name: of its fusion, "early_to_late" in units.
        early, late: paths of the block whose output it takes, and of the one before which it is fused.
        width: of the streams that its fusion takes.
        swaps: the late block's stream is laid out the other way round: (batch * a, b, D) where the early one's output is
            (batch * b, a, D).
        main: name of the main stream's argument and its place in what blocks return, where an adapter says so.
    """

    name: str
    early: str
    late: str
    width: int
    swaps: bool
    main: Main


class LongSkips(nn.ModuleDict):
    """The fusions of a model's long skip connections by name ("early_to_late"), and what connects them: ``model.long_skips``."""

    def __init__(self, fusion: str, pairs: tuple[tuple[int, int], ...], connections: tuple[Connection, ...]) -> None:
        super().__init__()
        self.fusion, self.pairs, self.connections = fusion, pairs, connections
        self.calls, self.passed = Calls(), Passed()
        self.patches: list[Patch] = []
        self.hooks: list[Any] = []
        self.removed = False

    def connect(self, model: nn.Module) -> None:
        """Install hooks and patches: partials of top-level functions, so that copies carry them along, bound to the copy."""
        for early, main in {connection.early: connection.main for connection in self.connections}.items():
            hook = partial(capture, self, early, main)
            self.hooks.append(model.get_submodule(early).register_forward_hook(hook, with_kwargs=True))
        for connection in self.connections:
            late = model.get_submodule(connection.late)
            self.hooks.append(late.register_forward_pre_hook(partial(pass_on, self, connection), with_kwargs=True))
            self.patches.append(Patch(late, "forward", fuse, self, connection))
        self.patches.append(Patch(model, "forward", open_call, self))

    def disconnect(self) -> None:
        """Take hooks and patches out again. A patch that lies under somebody else's stays, and does nothing."""
        self.removed = True
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.patches = [patch for patch in reversed(self.patches) if not patch.remove()]


def open_call(long_skips: LongSkips, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in the place of the model's forward. What is captured within is released at its end, whatever happens."""
    calls = long_skips.calls
    outer = calls.captured, calls.gradients
    calls.captured, calls.gradients = {}, torch.is_grad_enabled()
    try:
        return original(*args, **kwargs)
    finally:
        calls.captured, calls.gradients = outer


def capture(
    long_skips: LongSkips, early: str, main: Main, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    """An early block's hook: note what it returned, the very object."""
    calls = long_skips.calls
    if calls.captured is None:
        return
    if calls.gradients and not torch.is_grad_enabled():
        raise ModelError(
            f"the model's call records gradients, but block {early!r}, whose output a long skip connection takes in, runs without; "
            "if that is gradient checkpointing, write use_reentrant=False"
        )
    compare = not compiling() and any(c.early == early and c.late not in calls.compared for c in long_skips.connections)
    calls.captured[early] = Captured(main_output(early, main, args, kwargs, result), compare)


def pass_on(
    long_skips: LongSkips, connection: Connection, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A late block's hook: hand the early block's output to its forward."""
    captured = long_skips.calls.captured
    found = main_input(block.forward, connection.main, args, kwargs)
    stream = None if found is None else found[1]
    skip = None if captured is None else _taken(connection, captured, long_skips.calls.compared)
    if captured is None and stream is not None:
        # A checkpointed block runs again in the backward pass, when no call is open, with the very stream that it had.
        skip = long_skips.passed.find(stream)
    if skip is None:
        raise ModelError(_missing(connection, captured is not None))
    if captured is not None and stream is not None and torch.is_grad_enabled() and not compiling():
        # Also where the stream needs no gradient: the fusion's own weights may, and then a checkpointed block runs again too.
        long_skips.passed.note(stream, skip)
    return args, {**kwargs, ARGUMENT: skip}


def _taken(connection: Connection, captured: dict[str, Captured], compared: set[str]) -> Tensor | None:
    found = captured.get(connection.early)
    if found is None:
        return None
    if found.written:
        raise ModelError(
            f"block {connection.late!r} takes in what block {connection.early!r} returned, and that was written into since, by a "
            "block behind it or by the model; let that make a tensor of its own (x = x + y instead of x += y)"
        )
    if not compiling():
        compared.add(connection.late)
    return found.tensor


def _missing(connection: Connection, called: bool) -> str:
    what = f"block {connection.late!r} takes in a long skip connection from {connection.early!r}"
    if not called:
        return f"{what}, and was called outside of a call of the model; call that, and checkpoint with use_reentrant=False"
    return (
        f"{what}, and was called before block {connection.early!r} was called; give pairs= in the order of the model's calls, and "
        "where blocks are compiled, segments= that reuse both or neither"
    )


def fuse(
    long_skips: LongSkips,
    connection: Connection,
    original: Callable[..., Any],
    *args: Any,
    long_skip: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Stands in the place of a late block's forward: the block gets its stream fused with the long skip."""
    if long_skips.removed:
        return original(*args, **kwargs)
    if long_skip is None:
        raise ModelError(
            f"block {connection.late!r} takes in a long skip connection, and its forward was called directly, past torch's hooks; "
            "call the block itself, or cachekit.remove_long_skips(model) first"
        )
    found = main_input(original, connection.main, args, kwargs)
    if found is None:
        raise ModelError(f"block {connection.late!r} was called without any tensor to fuse a long skip connection with")
    path, x = found
    if x.shape[-1] != connection.width:
        raise ModelError(
            f"the fusion {connection.name} is made for streams of width {connection.width}, and block {connection.late!r} gets "
            f"{tuple(x.shape)}; write cachekit.add_long_skips(model, width={x.shape[-1]})"
        )
    skip = swapped(long_skip, x) if connection.swaps else long_skip
    if skip.shape != x.shape:
        raise ModelError(
            f"the long skip connection {connection.name} brings {tuple(long_skip.shape)} to a stream of {tuple(x.shape)}; "
            "give pairs= of blocks whose streams have one shape"
        )
    args, kwargs = with_input(args, kwargs, path, long_skips[connection.name](x, skip))
    return original(*args, **kwargs)
