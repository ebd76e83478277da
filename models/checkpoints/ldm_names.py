"""The names a UNet's parts have in the original latent-diffusion code. Torch-free.

LoRA files of kohya's trainer use them for SDXL. The way back, for whole checkpoints, is diffusers'
`convert_ldm_unet_checkpoint`; a test holds the two against each other.
"""

import re
from collections.abc import Collection

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
INSIDE_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)"
)


def ldm_names(names: Collection[str], layers_per_block: int) -> dict[str, str]:
    """diffusers' name to the original one, for each name that lies in a UNet's known parts.

    names: all modules or all tensors of the UNet.
    """
    attentive = {match[0] for name in names if (match := re.match(r"up_blocks\.\d+\.att", name))}
    found = {}
    for name in names:
        for old, new in OUTSIDE_BLOCKS.items():
            if name == old or name.startswith(f"{old}."):
                found[name] = _resnet_name(name.replace(old, new, 1), "resnets" in old)
        if match := _BLOCK.match(name):
            has_attention = f"up_blocks.{match['block']}.att" in attentive
            place = _block_place(match, layers_per_block, has_attention)
            rest = name[match.end() :]
            if place.endswith((".op", ".conv")):
                rest = rest.removeprefix(".conv")
            found[name] = _resnet_name(place + rest, match["kind"] == "resnets")
    return found


def _block_place(match: re.Match[str], layers_per_block: int, has_attention: bool) -> str:
    """Where a resnet, attention or resampler of a block stands in the flat list of the original.

    has_attention: the block has attentions, after which its upsampler comes.
    """
    first = int(match["block"]) * (layers_per_block + 1)
    layer = int(match["layer"])
    if match["kind"] == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if match["kind"] == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.{2 if has_attention else 1}.conv"
    position = 0 if match["kind"] == "resnets" else 1
    if match["side"] == "down":
        return f"input_blocks.{first + layer + 1}.{position}"
    return f"output_blocks.{first + layer}.{position}"


def _resnet_name(name: str, is_resnet: bool) -> str:
    if is_resnet:
        for old, new in INSIDE_RESNETS.items():
            name = re.sub(rf"\.{old}\b", f".{new}", name)
    return name
