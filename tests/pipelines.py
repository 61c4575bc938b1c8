"""Whole diffusers pipelines from small random parts: no download, a few milliseconds a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    LattePipeline,
    PixArtAlphaPipeline,
    WanPipeline,
)
from torch import Tensor
from zoo import DIT, FLUX, HUNYUAN_DIT, HUNYUAN_VIDEO, LATTE, PIXART, WAN

# Gentler than the betas of trained models: nothing here takes the noise away, so that samples would grow a hundredfold.
_BETAS = {"beta_start": 0.0001, "beta_end": 0.004, "beta_schedule": "linear"}


def _ddim() -> Any:
    # Its default clips the predicted sample to [-1, 1], which is for pixels.
    return DDIMScheduler(clip_sample=False, **_BETAS)


def _dpm() -> Any:
    return DPMSolverMultistepScheduler(**_BETAS)


def _heun() -> Any:
    return HeunDiscreteScheduler(**_BETAS)


def _flow() -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _flow_heun() -> Any:
    return FlowMatchHeunDiscreteScheduler(shift=3.0)


_DIFFUSION: dict[str, Callable[[], Any]] = {"ddim": _ddim, "dpm": _dpm, "heun": _heun}


@dataclass(frozen=True)
class Recipe:
    """A pipeline and its call.

    Attributes:
        name: of the pipeline.
        make: (scheduler, seed) -> the pipeline.
        arguments: (draw) -> what the call takes besides steps, generator and output; ``draw(*size)`` gives normal numbers.
        schedulers: name -> factory, for the schedulers that the pipeline takes.
        larger: arguments in whose place another size comes.
        branches: names of the CFG branches that are separate calls, in their order.
    """

    name: str
    make: Callable[[Any, int], Any]
    arguments: Callable[[Callable[..., Tensor]], dict[str, Any]]
    schedulers: dict[str, Callable[[], Any]]
    larger: dict[str, Any]
    branches: tuple[str, ...] = ("",)

    def build(self, scheduler: str, seed: int = 0) -> Any:
        """The pipeline with one of ``schedulers``. Equal seeds give equal weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.make(self.schedulers[scheduler](), seed)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, steps: int = 8, seed: int = 0, decode: bool = False, **changed: Any) -> Tensor:
        """One sampling run, with the recipe's arguments but for those that are ``changed``.

        Returns:
            The final latents, or with ``decode`` the images or frames; DiTPipeline always decodes.
        """
        prompts = torch.Generator().manual_seed(30_000 + seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=prompts)

        result = pipe(
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt" if decode or isinstance(pipe, DiTPipeline) else "latent",
            return_dict=False,
            **{**self.arguments(draw), **changed},
        )
        found: Tensor = result[0]
        return found

    def __str__(self) -> str:
        return self.name


def transformers(pipe: Any) -> list[Any]:
    """The pipeline's transformers: two in Wan 2.2, else one. Typed so that any attribute may be asked for."""
    found = [pipe.transformer, getattr(pipe, "transformer_2", None)]
    return [model for model in found if model is not None]


def _image_vae() -> Any:
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.0,
    )
    return vae.eval()


def _dit(scheduler: Any, seed: int) -> Any:
    return DiTPipeline(transformer=DIT.build(seed), vae=_image_vae(), scheduler=scheduler)


def _dit_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"class_labels": [3], "guidance_scale": 2.0}


def _pixart(scheduler: Any, seed: int) -> Any:
    return PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=_image_vae(), transformer=PIXART.build(seed), scheduler=scheduler
    )


def _pixart_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 6, 16),
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt": None,
        "negative_prompt_embeds": draw(1, 6, 16),
        "negative_prompt_attention_mask": torch.ones(1, 6),
        "guidance_scale": 2.0,
        "use_resolution_binning": False,
    }


def _latte(scheduler: Any, seed: int) -> Any:
    return LattePipeline(tokenizer=None, text_encoder=None, vae=_image_vae(), transformer=LATTE.build(seed), scheduler=scheduler)


def _latte_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 6, 16),
        "negative_prompt": None,
        "negative_prompt_embeds": draw(1, 6, 16),
        "guidance_scale": 2.0,
        "video_length": 3,
        "height": 64,
        "width": 64,
        "clean_caption": False,
    }


def _hunyuan_dit(scheduler: Any, seed: int) -> Any:
    return HunyuanDiTPipeline(
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=HUNYUAN_DIT.build(seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _hunyuan_dit_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 5, 16),
        "prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
        "negative_prompt_embeds": draw(1, 5, 16),
        "negative_prompt_attention_mask": torch.ones(1, 5, dtype=torch.long),
        "prompt_embeds_2": draw(1, 6, 16),
        "prompt_attention_mask_2": torch.ones(1, 6, dtype=torch.long),
        "negative_prompt_embeds_2": draw(1, 6, 16),
        "negative_prompt_attention_mask_2": torch.ones(1, 6, dtype=torch.long),
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
    }


def _hunyuan_video(scheduler: Any, seed: int) -> Any:
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2)
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=HUNYUAN_VIDEO.build(seed),
        vae=vae.eval(),
        scheduler=scheduler,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _hunyuan_video_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 6, 16),
        "pooled_prompt_embeds": draw(1, 16),
        "prompt_attention_mask": torch.ones(1, 6),
        "height": 64,
        "width": 64,
        "num_frames": 9,
    }


def _flux(scheduler: Any, seed: int) -> Any:
    return FluxPipeline(
        scheduler=scheduler,
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=FLUX.build(seed),
    )


def _flux_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {"prompt_embeds": draw(1, 6, 16), "pooled_prompt_embeds": draw(1, 16), "height": 64, "width": 64}


def _flux_true_cfg_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    negative = {"negative_prompt_embeds": draw(1, 6, 16), "negative_pooled_prompt_embeds": draw(1, 16)}
    return {**_flux_arguments(draw), **negative, "true_cfg_scale": 2.0}


def _wan_vae() -> Any:
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return vae.eval()


def _wan(scheduler: Any, seed: int, **options: Any) -> Any:
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=_wan_vae(), scheduler=scheduler, transformer=WAN.build(seed), **options
    )


def _wan_22(scheduler: Any, seed: int) -> Any:
    return _wan(scheduler, seed, transformer_2=WAN.build(seed + 1), boundary_ratio=0.8)


def _wan_ti2v(scheduler: Any, seed: int) -> Any:
    return _wan(scheduler, seed, expand_timesteps=True)


def _wan_arguments(draw: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, 6, 16),
        "negative_prompt_embeds": draw(1, 6, 16),
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
    }


# DiTPipeline does not scale its noise for schedulers that start elsewhere than at variance one, as Heun's does.
_ONE_EVALUATION = {name: _DIFFUSION[name] for name in ("ddim", "dpm")}
# Flux and HunyuanVideo hand their own sigmas to the scheduler, which the two-evaluation one for flows does not take.
_EULER = {"euler": _flow}
_FLOW = {"euler": _flow, "heun": _flow_heun}
_TALL = {"height": 96, "width": 64}
_CFG = ("cond", "uncond")

DIT_PIPELINE = Recipe("DiTPipeline", _dit, _dit_arguments, _ONE_EVALUATION, {"class_labels": [3, 5]})
PIXART_PIPELINE = Recipe("PixArtAlphaPipeline", _pixart, _pixart_arguments, _DIFFUSION, _TALL)
LATTE_PIPELINE = Recipe("LattePipeline", _latte, _latte_arguments, _DIFFUSION, _TALL)
HUNYUAN_DIT_PIPELINE = Recipe("HunyuanDiTPipeline", _hunyuan_dit, _hunyuan_dit_arguments, _DIFFUSION, _TALL)
HUNYUAN_VIDEO_PIPELINE = Recipe("HunyuanVideoPipeline", _hunyuan_video, _hunyuan_video_arguments, _EULER, _TALL, ("cond",))
FLUX_PIPELINE = Recipe("FluxPipeline", _flux, _flux_arguments, _EULER, _TALL, ("cond",))
FLUX_TRUE_CFG_PIPELINE = Recipe("FluxPipeline, true CFG", _flux, _flux_true_cfg_arguments, _EULER, _TALL, _CFG)
WAN_PIPELINE = Recipe("WanPipeline", _wan, _wan_arguments, _FLOW, _TALL, _CFG)
# Two transformers, one for the early and one for the late steps.
WAN_22_PIPELINE = Recipe("WanPipeline 2.2", _wan_22, _wan_arguments, _FLOW, _TALL, _CFG)
# A timestep for each token.
WAN_TI2V_PIPELINE = Recipe("WanPipeline 2.2 TI2V", _wan_ti2v, _wan_arguments, _FLOW, _TALL, _CFG)

RECIPES = (
    DIT_PIPELINE,
    PIXART_PIPELINE,
    LATTE_PIPELINE,
    HUNYUAN_DIT_PIPELINE,
    HUNYUAN_VIDEO_PIPELINE,
    FLUX_PIPELINE,
    FLUX_TRUE_CFG_PIPELINE,
    WAN_PIPELINE,
    WAN_22_PIPELINE,
    WAN_TI2V_PIPELINE,
)

PAIRS = [(recipe, scheduler) for recipe in RECIPES for scheduler in recipe.schedulers]


def for_each(pairs: Sequence[tuple[Recipe, str]] = PAIRS) -> pytest.MarkDecorator:
    """Give a test these pipelines and schedulers; all but a pipeline's first scheduler are slow."""
    made = []
    for recipe, scheduler in pairs:
        slow = scheduler != next(iter(recipe.schedulers))
        made.append(pytest.param(recipe, scheduler, id=f"{recipe}-{scheduler}", marks=pytest.mark.slow if slow else ()))
    return pytest.mark.parametrize(("recipe", "scheduler"), made)
