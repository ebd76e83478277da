"""The built-in model, loaded once for each module."""

import pytest
import torch

from models.checkpoints.catalog import ModelSpec
from models.checkpoints.registry import Components, load_components


@pytest.fixture(scope="module")
def builtin() -> Components:
    return load_components(ModelSpec("builtin", "builtin"), torch.device("cpu"), torch.float32)
