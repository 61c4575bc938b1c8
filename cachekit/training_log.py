"""A training's log: one JSON object a line, a picture of it, and a progress bar."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from cachekit.errors import ConfigError

Where = str | os.PathLike[str]
# In the order of the picture's panels; anything else in a line is not drawn.
PANELS = {
    "loss": ("loss", "target", "output", "features"),
    "cosine": ("adjacent cosine", "original cosine"),
    "distance": ("adjacent distance", "original distance"),
}


@dataclass
class Sums:
    """What was measured since the last line of the log. It stays on the device, so that only a line waits for it.

    Attributes:
        values, count: sums over so many steps.
        latest: of the last step alone.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    latest: dict[str, Tensor] = field(default_factory=dict)

    def add(self, measured: dict[str, Tensor]) -> None:
        """One step's measurements."""
        self.count += 1
        for key, value in measured.items():
            self.values[key] = self.values[key] + value.detach() if key in self.values else value.detach().clone()

    def take(self) -> dict[str, float]:
        """Means and the latest, to six digits; then everything is empty."""
        found = {**{key: value / self.count for key, value in self.values.items()}, **self.latest}
        self.values, self.count, self.latest = {}, 0, {}
        return {key: float(f"{float(value):.6g}") for key, value in found.items()}


class TrainingLog:
    """A JSONL file; None writes nothing."""

    def __init__(self, path: Where | None, plot: Where | None) -> None:
        if plot is not None:
            if path is None:
                raise ConfigError("plot= draws what log= writes; give both")
            _matplotlib()
        self.path, self.plot = None if path is None else Path(path), plot

    def start(self, step: int) -> None:
        """Keep the lines up to this step: a resumed training writes those behind it again."""
        if self.path is not None:
            kept = [line for line in read_log(self.path) if line["step"] <= step] if step and self.path.exists() else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, step: int, stage: int, means: dict[str, float]) -> None:
        """Add a line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "stage": stage, **means}) + "\n")

    def draw(self) -> None:
        """Draw what there is so far."""
        if self.path is not None and self.plot is not None:
            draw_log(self.path, self.plot)


def read_log(path: Where) -> list[dict[str, Any]]:
    """The lines of a log. One that was cut off in the middle is left out, with whatever follows it."""
    lines: list[dict[str, Any]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_log(path: Where, picture: Where) -> None:
    """Draw a log: the loss and its terms, and how similar deep features are. A dotted line stands where a stage begins."""
    lines = read_log(path)
    figure = _matplotlib().Figure(figsize=(12, 3.5), layout="constrained")
    begins = [before["step"] for before, line in pairwise(lines) if line["stage"] != before["stage"]]
    for axes, (title, keys) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for key in keys:
            known = [(line["step"], line[key]) for line in lines if key in line]
            if known:
                axes.plot(*zip(*known, strict=True), label=key, marker="." if len(known) < 20 else None)
                axes.legend(frameon=False)
        for begin in begins:
            axes.axvline(begin, color="grey", linestyle=":")
        axes.set(title=title, xlabel="step", yscale="log" if title == "loss" and lines else "linear")
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, format="png")


def progress_bar(total: int | None, start: int, wanted: bool) -> Any:
    """A bar of tqdm; None where it is not wanted, or tqdm is not installed."""
    try:
        return importlib.import_module("tqdm").tqdm(total=total, initial=start, unit="step") if wanted else None
    except ImportError:
        return None


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError:
        raise ConfigError("plot= is drawn by matplotlib; pip install matplotlib, or leave plot= out") from None
    return matplotlib.figure
