"""Between the host and a device, without the host waiting for what the device was given to do before or after."""

from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on a device, in the order of what it is given to do; from pinned memory nobody waits for that."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A device's tensor on its way to the host; on a CPU it is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._here, self._arrived = tensor, None
        if tensor.is_cuda:
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Any]:
        """Its numbers; waits for them, not for what the device was given to do since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()
