"""Tensors of a checkpoint that no part of its model takes: which do no harm, and what others mean.

Torch-free.
"""

import re
from collections.abc import Iterable

from models.errors import ModelUnavailable

UNUSED = re.compile(
    r"(.*\.)?(position_ids|logit_scale)|text_projection(\.weight)?"
    r"|(.*\.)?(vision_model|visual_projection)\..*|(loss|model_ema)\..*"
)
"""Tensors that a component may hold and that no picture needs: those of CLIP's other half, and what
only training used."""

MARKS = {
    r"\bedm_(mean|std|vpred)\b": "it was trained for EDM sampling",
    r"\b(scale_(weight|input)|(weight|input)_scale|scaled_fp8|comfy_quant)$": (
        "its weights are scaled fp8"
    ),
    r"\.(absmax|quant_map|quant_state\.\S*|SCB)$": "its weights are quantized",
    r"\b(label_emb|class_embedding)\.": "its UNet takes a class or an image (unCLIP)",
}
"""What the name of a tensor says of a kind of checkpoint that is not supported."""


def refuse_unused(names: Iterable[str]) -> None:
    """See that tensors which a model has no place for are none that its pictures need.

    Raises: ModelUnavailable, with the reason where a name gives it away.
    """
    unused = sorted(name for name in names if not UNUSED.fullmatch(name))
    if not unused:
        return
    reasons = (text for mark, text in MARKS.items() if any(map(re.compile(mark).search, unused)))
    more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
    raise ModelUnavailable(
        f"{next(reasons, 'it is of a kind that is not supported')}, and would be read without "
        f"{', '.join(unused[:3])}{more}"
    )
