"""The first call of a branch whose samples are decided on one by one: run once more with one sample alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cachekit.alone import Alone
from cachekit.batched import CannotSplit, compared, inputs_of
from cachekit.branch import Branch
from cachekit.call import Given, PlainCall
from cachekit.sampled import Batched, Sampled
from cachekit.samples import Part
from cachekit.segments import Site
from cachekit.tree import Path


class Trial:
    """Finds out how a part of this batch can be run.

    Args:
        sampled: where to say it.
        sites: what is decided on.
        given: the model call, before it is run: the tried sample's rows are copied here.
        part: which sample to try; the last one unless it is given.
    """

    def __init__(self, sampled: Sampled, sites: tuple[Site, ...], given: Given, part: Part | None = None) -> None:
        self.sampled, self.sites, self.given = sampled, sites, given
        # The last one: padding and masks tend to begin with the second.
        self.part = part or Part(sampled.samples, sampled.samples.all[-1:])
        self.inputs = inputs_of(self.part, given)
        self.alone = Alone()
        self.waits = 0

    def run(self, branch: Branch, whole: PlainCall, result: Any, call: Callable[[PlainCall, Given], Any]) -> str | None:
        """Run the sample alone, and compare.

        Args:
            whole, result: the call of the whole batch, and what the model returned.
            call: runs the model under a call, with these arguments.

        Returns:
            Why it can't be known how to run a part of the batch; None where it is.
        """
        try:
            other = call(self.alone, self.inputs)
            batched, self.waits = compared(self.part, whole, self.alone, self.given, (result, other))
            self._check_held(batched, branch)
        except CannotSplit as reason:
            return str(reason)
        except Exception as error:
            # Whatever a model may say to a batch that it was not made for.
            return f"one sample alone raises {type(error).__name__}"
        self.sampled.batched = batched
        return None

    def _check_held(self, batched: Batched, branch: Branch) -> None:
        layout = branch.layout
        _, prediction = batched.model
        lacking = set(prediction.shapes) - prediction.paths if any(site.segment.is_model for site in self.sites) else set[Path]()
        if layout is not None and branch.graph is not None:
            for action, (_, returned) in zip(layout.actions, batched.visits, strict=True):
                lacking |= set(action.hold) - returned.paths if action is not None else set()
            for (v, n), (_, returned) in batched.modules.items():
                held = {path for path, _ in branch.graph.visits[v].modules[n].held}
                lacking |= held - returned.paths if layout.modules[v][n] is not None else set()
        if lacking:
            raise CannotSplit("what is stored has no rows for each sample")
