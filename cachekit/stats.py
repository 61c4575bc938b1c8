"""What a wrapped model did: counted, never assumed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """One model call: step index, timestep, branch, and for each block visit in order whether the block ran.

    ``modules`` says the same of the calls of modules in the blocks that ran, where segments cover such modules.

    Attributes:
        shares, module_shares: the share of the batch's samples for which each ran; empty where that was all or none everywhere.
    """

    i: int
    t: float
    branch: str
    recomputed: tuple[bool, ...]
    modules: tuple[bool, ...] = ()
    shares: tuple[float, ...] = ()
    module_shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class SiteAudit:
    """One reused site of an audited step.

    Attributes:
        site: its index among ``wrap``'s segments.
        error: norm of what was reused less what the full pass has there, over the norm of the latter; all its tensors together.
        predicted: the same as the stored history foretold it (``Step.estimate``); None where it says nothing.
    """

    site: int
    error: float
    predicted: float | None


@dataclass(frozen=True)
class Audit:
    """One audited step.

    Attributes:
        i, t, branch: as ``Record``'s.
        error: of the model's output, reused against full, as ``SiteAudit.error``.
        sites: those that were reused.
    """

    i: int
    t: float
    branch: str
    error: float
    sites: tuple[SiteAudit, ...]


@dataclass
class Stats:
    """Counts since ``wrap`` or the last ``reset()``; ``records`` are those of the generation that started last.

    Attributes:
        steps: model calls.
        generations: generations that were begun.
        blocks_run, blocks_total: block visits that ran, and that the uncached model would have run. One that ran for a part of
            the batch counts as that share of a visit.
        modules_run, modules_total: calls of attention, cross-attention or MLP modules in blocks that ran, where segments cover
            such modules: those that ran, and that the uncached model would have run.
        bytes_held, bytes_peak: bytes of stored tensors now, and at the most.
        synchronisations: device synchronisations that reading timesteps, telling samples apart and probes caused.
        uncached: reason -> number of calls that were computed in full for it, with nothing stored.
        dropped: reason -> how often what was stored was dropped and computed again.
        notes: sentences about what could not be done as asked.
        records: one for each model call of the current generation.
        audits: one for each audited step of the current generation (``wrap``'s ``audit_every``).
        audited: full passes that were run in the shadow; each waits for the device. They are not in ``steps``.
        audit_blocks: block visits that ran in them, which are not in ``blocks_run``.
    """

    steps: int = 0
    generations: int = 0
    blocks_run: float = 0
    blocks_total: int = 0
    modules_run: float = 0
    modules_total: int = 0
    bytes_held: int = 0
    bytes_peak: int = 0
    synchronisations: int = 0
    uncached: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)
    audits: list[Audit] = field(default_factory=list)
    audited: int = 0
    audit_blocks: int = 0

    def begin(self, new_generation: bool, doubt: str | None, waits: int) -> None:
        """A model call has found its place, after so many device synchronisations."""
        self.synchronisations += waits
        if doubt:
            self.dropped[doubt] += 1
        if new_generation:
            self.generations += 1
            self.records, self.audits = [], []

    def count(self, record: Record, waits: int) -> None:
        """Add one model call, with the device synchronisations in it."""
        self.synchronisations += waits
        self.steps += 1
        self.blocks_run += sum(record.shares or record.recomputed)
        self.blocks_total += len(record.recomputed)
        self.modules_run += sum(record.module_shares or record.modules)
        self.modules_total += len(record.modules)
        self.records.append(record)

    def audit(self, found: Audit | None, blocks: int) -> None:
        """Add one full pass in the shadow of so many blocks; None where it failed."""
        self.audited += 1
        self.audit_blocks += blocks
        if found is not None:
            self.audits.append(found)

    def tried(self, blocks: int, modules: int, share: float, waits: int) -> None:
        """So many blocks and modules ran once more for a share of the batch, beside what the uncached model would have run."""
        self.blocks_run += blocks * share
        self.modules_run += modules * share
        self.synchronisations += waits

    def hold(self, nbytes: int) -> None:
        """Note how many bytes are stored now."""
        self.bytes_held = nbytes
        self.bytes_peak = max(self.bytes_peak, nbytes)

    def __str__(self) -> str:
        share = self.blocks_run / self.blocks_total if self.blocks_total else 1.0
        lines = [
            f"{_count(self.steps, 'step')} in {_count(self.generations, 'generation')}"
            + (f", {_number(self.blocks_run)} of {self.blocks_total} blocks run ({share:.0%})" if self.blocks_total else "")
            + (f", {_number(self.modules_run)} of {self.modules_total} modules in them" if self.modules_total else ""),
            f"{self.bytes_held / 2**20:.1f} MiB held, {self.bytes_peak / 2**20:.1f} MiB at the most",
        ]
        if self.audited:
            lines.append(f"{_count(self.audited, 'audit')}: full passes of {self.audit_blocks} blocks in the shadow")
        lines += [f"computed in full {count} times: {reason}" for reason, count in self.uncached.items()]
        lines += [f"stored values dropped {count} times: {reason}" for reason, count in self.dropped.items()]
        return "\n".join([*lines, *sorted(self.notes)])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:.1f}"
