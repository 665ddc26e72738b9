"""How often the host may wait for the GPU in a call of an op, and what counts it on a machine without one."""

from __future__ import annotations

import torch
from conformance.calls import Call
from simulated_cuda import OnDevice
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Forward and backward. A head waits for the number of rows that a mask keeps, a trained one in linear_logprobs also
# when it forms its logits again; nothing else waits.
ALLOWED = {"linear_logprobs": 1, "linear_cross_entropy": 1, "linear_logprobs, trained": 2}


def allowed(call: Call) -> int:
    return ALLOWED.get(call.name, ALLOWED.get(call.name.split(",")[0], 0))


class Waits(TorchDispatchMode):
    """Counts values and shapes that the host asks for, and on a simulated device copies from and to it."""

    ASK = (aten.nonzero, aten._local_scalar_dense, aten.equal, aten.masked_select, aten._unique2, aten.unique_dim)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += self._waits(function.overloadpacket, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _waits(self, packet, args, kwargs) -> bool:
        if packet in (aten.index, aten.index_put, aten.index_put_):
            return any(index is not None and index.dtype == torch.bool for index in args[1])
        if packet is aten.copy_:
            return isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice)
        if packet is aten._to_copy:  # where autograd casts a gradient, it takes the simulated device for the CPU
            to = kwargs.get("device")
            return not isinstance(args[0], OnDevice) and to is not None and torch.device(to).type == "cuda"
        return packet in self.ASK

    def of_methods(self, monkeypatch) -> None:
        """Counts copies to the host by methods of a simulated device's tensors, too, which no operator sees."""
        for name in ("cpu", "tolist", "to"):
            monkeypatch.setattr(OnDevice, name, self._counted(getattr(OnDevice, name)))

    def _counted(self, method):
        def run(tensor, *args, **kwargs):
            found = method(tensor, *args, **kwargs)
            self.count += not isinstance(found, OnDevice)
            return found

        return run
