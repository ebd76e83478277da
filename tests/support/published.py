"""Folders of published checkpoints without their weights."""

import json
from pathlib import Path

from models.checkpoints.families import CONFIG_FILES, Family, published_configs


def save_configs(folder: Path, family: Family, is_inpainting: bool) -> Path:
    """Write the configurations of a family's checkpoint, which has no safety checker."""
    configs = published_configs(family, is_inpainting)
    configs["unet"] |= {"in_channels": 9 if is_inpainting else 4}
    configs["model_index"] = {"safety_checker": [None, None]}
    for name in configs.keys() & CONFIG_FILES.keys():
        path = folder / CONFIG_FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(configs[name]))
    return folder
