"""Where products keep the width of their inputs."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, autocast narrows nothing. The meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
