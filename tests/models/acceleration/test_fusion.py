"""What fused modules keep of the plain ones; what they compute is in test_kernels and test_gpu."""

import copy

import torch
from diffusers import AutoencoderKL

from models.acceleration.fusion import FusedResnetBlock, fuse_modules


def small_vae() -> AutoencoderKL:
    """In half precision, with residual blocks that have a shortcut."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
    ).half()


def test_exact_copy_of_a_fused_vae_has_no_rounded_biases() -> None:
    """A picture that half precision could not decode is decoded by a float32 copy."""
    vae = small_vae()
    plain = dict(copy.deepcopy(vae).float().named_modules())
    fuse_modules(vae)

    blocks = 0
    for name, block in copy.deepcopy(vae).float().named_modules():
        if not isinstance(block, FusedResnetBlock) or block.conv_shortcut is None:
            continue
        blocks += 1
        assert torch.equal(
            block.outer_bias, plain[name].conv2.bias + plain[name].conv_shortcut.bias
        )
    assert blocks > 0
