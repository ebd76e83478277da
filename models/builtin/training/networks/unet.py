"""The denoiser's shape and schedule: v-prediction at zero terminal SNR, nine channels in.

How it is trained stands in `lessons` (what one sample teaches) and `trainer` (the loop).
"""

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from models.builtin.training.networks.text import WIDTH

TIMESTEPS = 1000


def build_unet() -> UNet2DConditionModel:
    """9 channels in, 4 out; attention on the two coarse levels only, so 1024 px stay cheap."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=9,
        out_channels=4,
        block_out_channels=(32, 64, 96, 104),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without meaning here, but the pipeline objects to any other
    )


def averaged_unet(state: dict[str, Any]) -> UNet2DConditionModel:
    """The network with the averaged weights of a checkpoint."""
    unet = build_unet()
    unet.load_state_dict(state["weights"])
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(state["average"]["values"][name])
    return unet.eval()
