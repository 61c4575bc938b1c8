"""Finished runs of a comparison on disk, so that a long one can be stopped and started again, or shared by several processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cachekit
from cachekit.demo.rows import Row
from cachekit.demo.target import Target
from cachekit.stats import Record


@dataclass(frozen=True)
class Ran:
    """One run of one row on one noise seed.

    Attributes:
        seconds: wall time.
        samples: what came out, on the CPU.
        blocks_run, blocks_total, bytes_peak: 0 where nothing was counted.
        notes, records: of the statistics.
    """

    seconds: float
    samples: Tensor
    blocks_run: float = 0
    blocks_total: int = 0
    bytes_peak: int = 0
    notes: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()


class Kept:
    """A folder with a file for each run; nothing is kept without one.

    A run is taken from there if the target's name and weights, the row, the seed, and the versions of cachekit and torch are the
    same, and so is ``also``. What a target's own sampling function does cannot be seen.

    Args:
        folder: made where there is none.
        also: what else runs depend on, such as the number of samples of a seed.

    Attributes:
        taken: how many runs came from the folder.
    """

    def __init__(self, folder: Path | None = None, also: str = "") -> None:
        self.folder, self.also, self.taken = folder, also, 0
        self._digests: dict[int, str] = {}

    def run(self, target: Target, row: Row, seed: int, make: Callable[[], Ran]) -> Ran:
        """A run from the folder, or made and put there."""
        how = [row.kind, row.solver.name, row.steps, row.policy, row.segments, row.reuse]
        return _ran(self._get(target, how, seed, lambda: _plain(make())))

    def solution(self, target: Target, seed: int, make: Callable[[], Tensor]) -> Tensor:
        """A fine solution, likewise."""
        found: Tensor = self._get(target, ["fine"], seed, make)
        return found

    def _get(self, target: Target, how: list[Any], seed: int, make: Callable[[], Any]) -> Any:
        if self.folder is None:
            return make()
        file = self.folder / self._name(target, how) / f"{seed}.pt"
        if file.exists():
            self.taken += 1
            return torch.load(file, weights_only=True)
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        # Put in its place whole, whatever stops the process.
        torch.save(made, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        return made

    def _name(self, target: Target, how: list[Any]) -> str:
        if id(target.model) not in self._digests:
            self._digests[id(target.model)] = _digest(target.model)
        weights = self._digests[id(target.model)]
        known = [target.name, weights, how, self.also, cachekit.__version__, torch.__version__, torch.get_num_threads()]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:20]


def _plain(ran: Ran) -> tuple[Any, ...]:
    """As values that ``torch.load`` takes from any file."""
    counts = ran.seconds, ran.samples, ran.blocks_run, ran.blocks_total, ran.bytes_peak
    return *counts, ran.notes, tuple(astuple(record) for record in ran.records)


def _ran(values: tuple[Any, ...]) -> Ran:
    ran = Ran(*values)
    return replace(ran, records=tuple(Record(*each) for each in values[-1]))


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for key, value in model.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
