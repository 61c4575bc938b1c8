"""The pictures of a comparison: samples side by side, and what was recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cachekit.demo.measure import Measured
from cachekit.demo.target import Target

MOST_IMAGES = 12


def pyplot() -> Any:
    """matplotlib's, drawing into files."""
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def sample_grid(target: Target, title: str, found: Sequence[Measured], path: Path) -> None:
    """A row of images for each row of the table, all from the same noise."""
    plt = pyplot()
    if target.pixels is None:
        return
    rows = [_images(target.pixels(torch.cat(each.samples)[:MOST_IMAGES])).numpy() for each in found]
    labels = [_described(each, found[0]) for each in found]
    count, height, margin = len(rows[0]), 0.62, 0.3 + 0.073 * max(map(len, labels))
    figure = plt.figure(figsize=(margin + 0.1 + height * count, 0.6 + height * len(rows)), layout="none")
    left, top = margin / figure.get_figwidth(), 1 - 0.45 / figure.get_figheight()
    box = figure.add_axes((left, 0.1 / figure.get_figheight(), 0.99 - left, top - 0.1 / figure.get_figheight()))
    box.imshow(_joined(rows), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    box.set_yticks([(k + 0.5) * rows[0].shape[2] for k in range(len(rows))], labels)
    box.set_xticks([])
    box.tick_params(length=0, labelsize=9)
    for spine in box.spines.values():
        spine.set_visible(False)
    figure.suptitle(title, x=0.02, y=1 - 0.12 / figure.get_figheight(), ha="left", va="top", fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _described(each: Measured, uncached: Measured) -> str:
    speed = f"{uncached.time / each.time:.2f}x"
    return f"{each.row.label}   {speed}" + (f"   error {np.mean(each.errors):.4f}" if each is not uncached else "")


def _images(pixels: Tensor) -> Tensor:
    """Of clips (n, channels, frames, height, width) the frame in the middle."""
    return pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2]


def _joined(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Rows of (n, channels, height, width) as one image (rows * height, n * width), or with colours last."""
    lines = [np.concatenate(list(row), axis=2) for row in rows]
    whole = np.concatenate(lines, axis=1)
    joined: NDArray[np.float32] = whole[0] if len(whole) == 1 else np.moveaxis(whole[:3], 0, -1)
    return joined


def block_map(title: str, found: Sequence[Measured], path: Path, columns: int = 2) -> None:
    """For each policy, which blocks ran at which step: dark where recomputed."""
    plt = pyplot()
    cached = [each for each in found if each.row.kind == "cached" and each.records]
    if not cached:
        return
    lines = -(-len(cached) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(11, 0.6 + 1.35 * lines), squeeze=False, layout="constrained")
    for each, axis in zip(cached, axes.flat, strict=False):
        ran = np.array([record.recomputed for record in each.records], dtype=float).T
        axis.imshow(ran, cmap="Blues", vmin=-0.15, vmax=1.2, aspect="auto", interpolation="nearest", origin="lower")
        axis.set_title(f"{each.row.label}: {each.blocks_run} of {each.blocks_total} blocks", fontsize=9, loc="left")
        axis.set_yticks([0, ran.shape[0] - 1])
        axis.tick_params(labelsize=7)
        axis.set_ylabel("block", fontsize=8)
    for axis in axes.flat[len(cached) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.suptitle(f"{title}: what was recomputed (dark) and reused (light)", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
