"""The original DiT's parameter names (arXiv 2212.09748) as diffusers has them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# diffusers gives every block embedders of its own; they are equal.
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the original ``DiT`` under ``DiTTransformer2DModel``'s names. Keys that it doesn't know stay."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        prefix, _, inner = module.partition(".")
        index, _, inner = inner.partition(".")
        if module in _OUTSIDE:
            found[f"{_OUTSIDE[module]}.{kind}"] = value
        elif module in _EMBEDDERS:
            found.update({f"transformer_blocks.{i}.{_EMBEDDERS[module]}.{kind}": value for i in range(depth)})
        elif prefix == "blocks" and inner == "attn.qkv":
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[f"transformer_blocks.{index}.attn1.to_{name}.{kind}"] = part
        elif prefix == "blocks" and inner in _BLOCK:
            found[f"transformer_blocks.{index}.{_BLOCK[inner]}.{kind}"] = value
        else:
            found[key] = value
    return found
