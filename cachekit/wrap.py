"""wrap, unwrap, and the handle that a wrapped model carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Integral
from typing import Any, TypeVar

from torch import nn

from cachekit import guidance
from cachekit.adapter import Adapter, adapter_for
from cachekit.branch import Name
from cachekit.engine import Engine
from cachekit.errors import ConfigError, ModelError
from cachekit.for_model import bound
from cachekit.interceptors import owner_of
from cachekit.session import Generation
from cachekit.sites import passes, sites
from cachekit.spec import parse_policy
from cachekit.stats import Stats

M = TypeVar("M", bound=nn.Module)


class Handle:
    """What a wrapped model carries as ``model.cachekit``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def stats(self) -> Stats:
        """What was run, reused and held, and what could not be cached."""
        return self._engine.stats

    @property
    def adapter(self) -> Adapter:
        """The facts about the model that are in use."""
        return self._engine.adapter

    def reset(self) -> None:
        """Forget everything stored and start the statistics anew. A session goes on, with the steps that it has left."""
        self._engine.stats = Stats()
        self._engine.lanes.reset()

    def session(self, *, steps: int | None = None, timesteps: Sequence[float] | None = None) -> AbstractContextManager[None]:
        """One generation, said explicitly: nothing is guessed from the samples, and nothing is held afterwards.

        It covers the thread or asyncio task that enters it, in which two of them may be nested, but not take turns.

        Args:
            steps: number of model calls of one branch, for guards of the last steps.
            timesteps: the schedule instead; only its length is used.

        Raises:
            ConfigError: both are given and disagree, or steps is no positive number; or it ends while another one, opened within,
                goes on.
        """
        if timesteps is not None:
            if steps is not None and steps != len(timesteps):
                raise ConfigError(f"steps={steps}, but there are {len(timesteps)} timesteps; give one of them")
            steps = len(timesteps)
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1):
            raise ConfigError(f"steps={steps!r}: give the number of model calls of one branch, a whole number of at least one step")
        return self._engine.lanes.within(Generation(None if steps is None else int(steps), explicit=True))

    def branch(self, name: str) -> AbstractContextManager[None]:
        """Calls within are of the CFG branch of this name, whatever their conditioning."""
        return self._engine.lanes.named(Name(name, binding=True))

    def disabled(self) -> AbstractContextManager[None]:
        """Calls within run as if the model were not wrapped; what is stored stays, until steps are missed for it."""
        return self._engine.lanes.disabled()

    def remove(self) -> None:
        """The same as ``cachekit.unwrap(model)``."""
        unwrap(self._engine.model)


def wrap(
    model: M,
    policy: Any = "skip-every-2",
    *,
    segments: Any = None,
    reuse: Any = None,
    adapter: Adapter | str | None = None,
    audit_every: int | None = None,
    per_sample: bool | int = False,
    cond: guidance.Cond | None = None,
) -> M:
    """Make a transformer's block stack skippable per denoising step.

    Args:
        model: any module whose forward takes a sample and a timestep and runs blocks; changed in place, keys and weights untouched.
        policy: when to recompute: a spec such as ``"skip-every-2"``, ``"N2-700-50"`` or ``"every-2 | outside-700-50"``, or a
            ``Policy``.
        segments: where: ``"middle"`` (all but the first and last block; the default), ``"all"``, ``"skip-K"``, ``"model"`` (the
            whole prediction), ``"uncond"`` (that of guidance's unconditional pass), (start, stop), or a list of these and of
            ``Segment``.
        reuse: what a reused segment returns: ``"output"`` (the default of literal policies), ``"residual"``, ``"taylor-K"``,
            ``"residual-taylor-K"``, a published operator such as ``"bdf2"``, or a ``Forecast`` or other ``Reuse``.
        adapter: an ``Adapter`` or the name of one; found by the model's class otherwise.
        audit_every: k, to run the full pass beside every k-th reused step of a branch and note in ``stats.audits`` what the
            reused one is off by. It changes no sample, and costs what it saves elsewhere.
        per_sample: decide for each sample of a batch by itself; blocks are run on those alone that are recomputed. Costs one more
            call with a single sample for each generation and branch. A number: so many rows in a row of the batch's length over
            it belong to each sample, as where a pipeline batches the passes of its guidance (2), and share its decision.
        cond: for ``segments="uncond"``, which pass of guidance is the conditional one. ``"first"`` or ``"last"``: that half of
            one batch. ``"before"``: of separate calls the first one of each step. None: of separate calls that of the branch
            that is named ``"cond"``, by the pipeline or by ``model.cachekit.branch``.

    Returns:
        The same model, with ``model.cachekit`` for statistics and control. One that is wrapped already gets the new policy.

    Raises:
        ConfigError: a policy, segment, reuse or adapter that can't be read, an ``audit_every`` that is no positive number, or what
            can't go together.
        ModelError: not a module, or one that holds or lies in another wrapped module.
    """
    preset = parse_policy(policy)
    if audit_every is not None and (isinstance(audit_every, bool) or not isinstance(audit_every, int) or audit_every < 1):
        raise ConfigError(f"audit_every={audit_every!r}: give a whole number, 1 for every reused step, or None for no audits")
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no torch.nn.Module; wrap the transformer itself, for example pipe.transformer")
    _refuse_nesting(model)
    facts = adapter_for(model, adapter)
    decided = sites(lambda written: bound(parse_policy(written), model, facts), preset, segments, reuse)
    rows = passes(per_sample, decided, audit_every)
    guidance.check(decided, cond, per_sample=bool(rows), audited=audit_every is not None)
    unwrap(model)
    engine = Engine(model, decided, facts, audit_every, rows, cond)
    engine.attach()
    model.__dict__["cachekit"] = Handle(engine)
    return model


def unwrap(model: M) -> M:
    """Take everything out again: every ``__dict__`` is as it was before ``wrap``. A model that is not wrapped stays as it is.

    Raises:
        ModelError: a shallow copy of a wrapped model, which shares the latter's blocks and its cache.
    """
    handle = model.__dict__.get("cachekit") if isinstance(model, nn.Module) else None
    if isinstance(handle, Handle):
        if handle._engine.model is not model:
            raise ModelError(
                f"this {type(model).__name__} is a shallow copy of a wrapped one and shares its blocks; cachekit.unwrap that one "
                "before it is copied, or take copy.deepcopy"
            )
        handle._engine.detach()
        del model.__dict__["cachekit"]
    return model


@contextmanager
def beneath(model: nn.Module) -> Iterator[None]:
    """Take a wrapped model's interceptors off for as long as something is put beneath them. What is stored is forgotten.

    Raises:
        ModelError: somebody else's hook lies on one of them.
    """
    handle = model.__dict__.get("cachekit")
    if not isinstance(handle, Handle):
        yield
        return
    handle._engine.lift()
    try:
        yield
    finally:
        handle._engine.attach()


def _refuse_nesting(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if name and "cachekit" in module.__dict__:
            raise ModelError(f"its module {name!r} is wrapped already; cachekit.unwrap that one first, or wrap only one of the two")
        owner = owner_of(module)
        if owner is not None and owner.model is not model:
            raise ModelError(
                f"{f'its module {name!r}' if name else 'it'} lies in a {type(owner.model).__name__} that is wrapped already; "
                "cachekit.unwrap that one first, or wrap only one of the two"
            )
