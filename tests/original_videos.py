"""The rest of the stand-ins for original repositories: Latte, Hunyuan-DiT and HunyuanVideo. See ``originals``."""

from __future__ import annotations

from typing import Any

import torch
from originals import CHANNELS, PATCH, WIDTH, Attention, DiTBlock, Embedder, FinalLayer, Guided, Mlp, Patches, attend, unpatchify
from torch import Tensor, nn

FRAMES = 3


def swap(x: Tensor, batch: int) -> Tensor:
    """((batch a), b, width) -> ((batch b), a, width): from frames of tokens to tokens over frames, and back."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2).flatten(0, 1).contiguous()


class Latte(Guided):
    """Class to video. One list, in which spatial and temporal blocks alternate."""

    def __init__(self, depth: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = Patches(), Embedder()
        self.y_embedder = nn.Embedding(num_classes + 1, WIDTH)
        self.temp_embed = nn.Parameter(torch.randn(1, FRAMES, WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(depth)])
        self.final_layer = FinalLayer()

    def forward(self, x: Tensor, t: Tensor, y: Any = None, text_embedding: Any = None, use_fp16: bool = False) -> Tensor:
        batch, frames = x.shape[:2]
        rows = x.shape[-2] // PATCH
        x = self.x_embedder(x.flatten(0, 1))
        tokens = x.shape[1]
        c = self.t_embedder(t) + self.y_embedder(y)
        spatial, temporal = c.repeat_interleave(frames, 0), c.repeat_interleave(tokens, 0)
        for i in range(0, len(self.blocks), 2):
            spatial_block, temporal_block = self.blocks[i : i + 2]
            x = swap(spatial_block(x, spatial), batch)
            if i == 0:
                x = x + self.temp_embed
            x = swap(temporal_block(x, temporal), batch)
        return torch.unflatten(unpatchify(self.final_layer(x, spatial), rows), 0, (batch, frames))


class SpatialBlock(nn.Module):
    """A block with cross-attention and the many arguments that diffusers' blocks had."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn1, self.attn2, self.ff = Attention(), Attention(WIDTH), Mlp()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
    ) -> Tensor:
        shift, scale, gate = timestep[:, None].chunk(3, dim=-1)
        hidden_states = hidden_states + gate * self.attn1(self.norm1(hidden_states) * (1 + scale) + shift)
        if encoder_hidden_states is not None:
            hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)
        return hidden_states + self.ff(self.norm2(hidden_states))  # type: ignore[no-any-return]


class LatteT2V(nn.Module):
    """Text to video. Two lists, called in turns."""

    temp_pos_embed: Tensor

    def __init__(self, num_layers: int = 4, caption_channels: int = 12) -> None:
        super().__init__()
        self.pos_embed, self.adaln_single = Patches(), Embedder(3 * WIDTH)
        self.caption_projection = nn.Linear(caption_channels, WIDTH)
        self.transformer_blocks = nn.ModuleList([SpatialBlock() for _ in range(num_layers)])
        self.temporal_transformer_blocks = nn.ModuleList([SpatialBlock() for _ in range(num_layers)])
        self.register_buffer("temp_pos_embed", torch.randn(1, FRAMES, WIDTH), persistent=False)
        self.proj_out = nn.Linear(WIDTH, PATCH * PATCH * 2 * CHANNELS)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        encoder_hidden_states: Any = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Any:
        batch, _, frames, height, _ = hidden_states.shape
        x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1))
        c = self.adaln_single(timestep)
        text = self.caption_projection(encoder_hidden_states).repeat_interleave(frames, 0)
        spatial, temporal = c.repeat_interleave(frames, 0), c.repeat_interleave(x.shape[1], 0)
        for i, pair in enumerate(zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)):
            x = pair[0](x, None, text, None, spatial, None, None)
            if enable_temporal_attentions:
                x = swap(x, batch)
                if i == 0 and frames > 1:
                    x = x + self.temp_pos_embed
                x = swap(pair[1](x, None, None, None, temporal, None, None), batch)
        output = torch.unflatten(unpatchify(self.proj_out(x), height // PATCH), 0, (batch, frames)).transpose(1, 2)
        return {"x": output} if return_dict else (output,)


class HunYuanDiTBlock(nn.Module):
    """A block that may take in, beside its input, what an early block returned."""

    def __init__(self, text: int, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2, self.mlp = Attention(), Attention(text), Mlp()
        self.default_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.skip_norm = nn.LayerNorm(2 * WIDTH) if skip else None
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if skip else None

    def forward(self, x: Tensor, c: Any = None, text_states: Any = None, freq_cis_img: Any = None, skip: Any = None) -> Tensor:
        if self.skip_linear is not None and self.skip_norm is not None:
            x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
        cos, sin = freq_cis_img
        x = x + self.attn1((self.norm1(x) + self.default_modulation(c)[:, None]) * cos + sin)
        x = x + self.attn2(self.norm3(x), text_states)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class HunYuanDiT(nn.Module):
    """Text to image. The first half's outputs are kept in a list, from whose end the second half takes them."""

    def __init__(self, depth: int = 8, text_states_dim: int = 12) -> None:
        super().__init__()
        self.depth = depth
        self.mlp_t5 = nn.Sequential(nn.Linear(10, 20), nn.SiLU(), nn.Linear(20, text_states_dim))
        self.text_embedding_padding = nn.Parameter(torch.randn(4 + 5, text_states_dim))
        self.x_embedder, self.t_embedder = Patches(), Embedder()
        self.extra_embedder = nn.Sequential(nn.Linear(10 + 6, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList([HunYuanDiTBlock(text_states_dim, layer > depth // 2) for layer in range(depth)])
        self.final_layer = FinalLayer()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Any = None,
        text_embedding_mask: Any = None,
        encoder_hidden_states_t5: Any = None,
        text_embedding_mask_t5: Any = None,
        image_meta_size: Any = None,
        style: Any = None,
        cos_cis_img: Any = None,
        sin_cis_img: Any = None,
        return_dict: bool = True,
    ) -> Any:
        rows = x.shape[-2] // PATCH
        texts = torch.cat([encoder_hidden_states, self.mlp_t5(encoder_hidden_states_t5)], dim=1)
        masks = torch.cat([text_embedding_mask, text_embedding_mask_t5], dim=-1).bool()
        texts = torch.where(masks.unsqueeze(2), texts, self.text_embedding_padding)
        x = self.x_embedder(x)
        extra = torch.cat([encoder_hidden_states_t5.mean(dim=1), image_meta_size], dim=1)
        c = self.t_embedder(t) + self.extra_embedder(extra)
        skips: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if layer > self.depth // 2:
                x = block(x, c, texts, (cos_cis_img, sin_cis_img), skips.pop())
            else:
                x = block(x, c, texts, (cos_cis_img, sin_cis_img))
            if layer < self.depth // 2 - 1:
                skips.append(x)
        output = unpatchify(self.final_layer(x, c), rows)
        return {"x": output} if return_dict else output


class DoubleBlock(nn.Module):
    """Two streams with weights of their own and a common attention."""

    def __init__(self) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.img_attn_qkv, self.txt_attn_qkv = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.img_attn_proj, self.txt_attn_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.img_mlp, self.txt_mlp = Mlp(), Mlp()

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, mask: Tensor, freqs_cis: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.img_mod(vec)[:, None].chunk(3, dim=-1)
        txt_shift, txt_scale, txt_gate = self.txt_mod(vec)[:, None].chunk(3, dim=-1)
        q, k, v = self.img_attn_qkv(img * (1 + scale) + shift).chunk(3, dim=-1)
        if freqs_cis is not None:
            q, k = q * freqs_cis[0] + freqs_cis[1], k * freqs_cis[0] + freqs_cis[1]
        qt, kt, vt = self.txt_attn_qkv(txt * (1 + txt_scale) + txt_shift).chunk(3, dim=-1)
        joint = attend(torch.cat([q, qt], 1), torch.cat([k, kt], 1), torch.cat([v, vt], 1), mask)
        img = img + gate * self.img_attn_proj(joint[:, : img.shape[1]])
        txt = txt + txt_gate * self.txt_attn_proj(joint[:, img.shape[1] :])
        return img + self.img_mlp(img), txt + self.txt_mlp(txt)


class SingleBlock(nn.Module):
    """One stream of both; attention and MLP side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp_act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor, vec: Tensor, txt_len: int, mask: Tensor, freqs_cis: Any = None) -> Tensor:
        shift, scale, gate = self.modulation(vec)[:, None].chunk(3, dim=-1)
        q, k, v, mlp = self.linear1(x * (1 + scale) + shift).split([WIDTH, WIDTH, WIDTH, 2 * WIDTH], dim=-1)
        return x + gate * self.linear2(torch.cat([attend(q, k, v, mask), self.mlp_act(mlp)], dim=-1))  # type: ignore[no-any-return]


class Refiner(nn.Module):
    """The text's own small transformer: a list of blocks that is not part of the stack."""

    def __init__(self, text: int) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(text, WIDTH)
        self.t_embedder = Embedder()
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList([DiTBlock() for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.input_embedder(x), self.t_embedder(t)
        for block in self.individual_token_refiner.blocks:  # type: ignore[union-attr]
            x = block(x, c)
        return x


class HYVideoDiffusionTransformer(nn.Module):
    """Text to video. Blocks with two streams, then blocks with one that holds both."""

    def __init__(self, double: int = 3, single: int = 4, text_states_dim: int = 12) -> None:
        super().__init__()
        self.img_in, self.txt_in = Patches(), Refiner(text_states_dim)
        self.time_in, self.guidance_in = Embedder(), Embedder()
        self.vector_in = nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.double_blocks = nn.ModuleList([DoubleBlock() for _ in range(double)])
        self.single_blocks = nn.ModuleList([SingleBlock() for _ in range(single)])
        self.final_layer = FinalLayer(CHANNELS)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text_states: Any = None,
        text_mask: Any = None,
        text_states_2: Any = None,
        freqs_cos: Any = None,
        freqs_sin: Any = None,
        guidance: Any = None,
        return_dict: bool = True,
    ) -> Any:
        batch, _, frames, height, _ = x.shape
        vec = self.time_in(t) + self.vector_in(text_states_2) + self.guidance_in(guidance)
        img = torch.unflatten(self.img_in(x.transpose(1, 2).flatten(0, 1)), 0, (batch, frames)).flatten(1, 2)
        txt = self.txt_in(text_states, t)
        txt_len, img_len = txt.shape[1], img.shape[1]
        mask = torch.cat([torch.ones(batch, img_len), text_mask], dim=1).bool()[:, None, None]
        freqs = (freqs_cos, freqs_sin) if freqs_cos is not None else None
        for block in self.double_blocks:
            img, txt = block(*[img, txt, vec, mask, freqs])
        x = torch.cat((img, txt), 1)
        for block in self.single_blocks:
            x = block(*[x, vec, txt_len, mask, (freqs_cos, freqs_sin)])
        img = self.final_layer(x[:, :-txt_len, ...], vec)
        video = unpatchify(torch.unflatten(img, 1, (frames, -1)).flatten(0, 1), height // PATCH)
        video = torch.unflatten(video, 0, (batch, frames)).transpose(1, 2)
        return {"x": video} if return_dict else video
