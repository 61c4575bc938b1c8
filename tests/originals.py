"""Small stand-ins for the transformers of the original repositories, which are no packages that a test could install.

Each has the class name, the arguments, the block lists and the rearrangements of its original, so that everything by which
cachekit knows such a model is as it is there. What is inside a block is as plain as it can be. Written anew after the papers:
DiT (arXiv 2212.09748), PixArt (2310.00426), Latte (2401.03048), Hunyuan-DiT (2405.08748), HunyuanVideo (2412.03603).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 24
HEADS = 2
CHANNELS = 4
PATCH = 2


def heads(x: Tensor) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    return torch.unflatten(x, -1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of (batch, tokens, width) tensors over heads."""
    return functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention, or attention to a context."""

    def __init__(self, context: int | None = None) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(context or WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        return self.proj(attend(self.q(x), k, v, mask))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class Embedder(nn.Module):
    """Numbers of any shape (n,) -> (n, width)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.exp(-torch.arange(8) * 1.15)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """(batch, channels, height, width) -> tokens with their positions, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.linspace(0.1, 1, WIDTH, dtype=x.dtype)
        return x + places.sin()


def unpatchify(x: Tensor, rows: int) -> Tensor:
    """(batch, tokens, patch * patch * channels) -> (batch, channels, height, width)."""
    x = torch.unflatten(torch.unflatten(x, 1, (rows, -1)), -1, (PATCH, PATCH, -1))
    return torch.einsum("nhwpqc->nchpwq", x).flatten(4, 5).flatten(2, 3)


class FinalLayer(nn.Module):
    """Modulated projection to patches."""

    def __init__(self, channels: int = 2 * CHANNELS) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, PATCH * PATCH * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    """Self-attention and MLP, both modulated and gated by the block's own layer (adaLN)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = Mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class Guided(nn.Module):
    """The two CFG passes as one batch, by a method that calls the model's own ``forward``."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, **kwargs: Any) -> Tensor:
        """The second half of the batch is unconditional; only the first half of x is looked at."""
        half = x[: len(x) // 2]
        prediction = self.forward(torch.cat([half, half]), t, y, **kwargs)
        noise, rest = prediction.split(CHANNELS, dim=-3)
        cond, uncond = noise.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=-3)


class DiT(Guided):
    """Class to image."""

    def __init__(self, depth: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = Patches(), Embedder()
        self.y_embedder = nn.Embedding(num_classes + 1, WIDTH)
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(depth)])
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows = x.shape[-2] // PATCH
        x = self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), rows)


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention and MLP; the modulation comes from outside but for a table (adaLN-single)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn, self.cross_attn, self.mlp = Attention(), Attention(WIDTH), Mlp()
        self.scale_shift_table = nn.Parameter(torch.randn(6, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: list[int] | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + torch.unflatten(t, -1, (6, -1))).chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        # The prompts of the batch stand in one row without their padding; ``mask`` holds their lengths.
        texts = torch.split(y[0], mask if mask is not None else [y.shape[1] // len(x)] * len(x))
        x = x + torch.cat([self.cross_attn(image[None], text[None]) for image, text in zip(x, texts, strict=True)])
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class PixArt(Guided):
    """Text to image at one size."""

    def __init__(self, depth: int = 5, caption_channels: int = 12) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = Patches(), Embedder()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.y_embedder = nn.Linear(caption_channels, WIDTH)
        self.blocks = nn.ModuleList([PixArtBlock() for _ in range(depth)])
        self.final_layer = FinalLayer()

    def conditioned(self, t: Tensor, data_info: Any) -> Tensor:
        """The embedding of what modulates the blocks."""
        return self.t_embedder(t)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Any = None, data_info: Any = None, **kwargs: Any) -> Tensor:
        rows = x.shape[-2] // PATCH
        x = self.x_embedder(x)
        c = self.conditioned(t, data_info)
        mask = torch.ones(y.shape[0], y.shape[-2], dtype=torch.long) if mask is None else mask.squeeze(1).squeeze(1)
        text = self.y_embedder(y).squeeze(1).masked_select(mask.unsqueeze(-1) != 0).view(1, -1, WIDTH)
        modulation, lengths = self.t_block(c), mask.sum(dim=1).tolist()
        for block in self.blocks:
            x = block(x, text, modulation, lengths, **kwargs)
        return unpatchify(self.final_layer(x, c), rows)

    def forward_with_dpmsolver(self, x: Tensor, t: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        """The prediction without the variance."""
        return self.forward(x, t, y, **kwargs).chunk(2, dim=1)[0]


class PixArtMS(PixArt):
    """Text to image at any size, which is a condition too."""

    def __init__(self, depth: int = 5, caption_channels: int = 12) -> None:
        super().__init__(depth, caption_channels)
        self.csize_embedder, self.ar_embedder = Embedder(WIDTH // 3), Embedder(WIDTH // 3)

    def conditioned(self, t: Tensor, data_info: Any) -> Tensor:
        size = torch.unflatten(self.csize_embedder(data_info["img_hw"].flatten()), 0, (-1, 2)).flatten(1)
        ratio = self.ar_embedder(data_info["aspect_ratio"].flatten())
        return self.t_embedder(t) + torch.cat([size, ratio], dim=1)  # type: ignore[no-any-return]
