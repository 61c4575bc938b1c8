"""Read Fashion-MNIST (MIT licence; Debian's package ``dataset-fashion-mnist`` or the authors' four IDX files)."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch


def read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes, as an array of the shape its header gives.

    Raises:
        ValueError: the file is no IDX file of bytes, or is cut short.
    """
    raw = gzip.decompress(path.read_bytes())
    zeros, kind, ndim = struct.unpack(">HBB", raw[:4])
    if zeros != 0 or kind != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes; use the gzipped files of Fashion-MNIST")
    shape = struct.unpack(f">{ndim}I", raw[4 : 4 + 4 * ndim])
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    if data.size != math.prod(shape):
        raise ValueError(f"{path} is cut short: {data.size} bytes for shape {shape}; fetch it again")
    return data.reshape(shape)


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of one split in [-1, 1], shape (n, 1, 28, 28), and their classes, shape (n,).

    Args:
        folder: holds ``train-images-idx3-ubyte.gz`` and its three companions.
        split: ``"train"`` (60,000) or ``"t10k"`` (10,000, for evaluation only).
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images.copy())[:, None].float() / 127.5 - 1, torch.from_numpy(labels.copy()).long()
