"""Refuses what makes the host wait for a device, and so what a CUDA graph cannot hold.

Told by the operation alone, so that it works without a GPU too; there, what Triton's interpreter
does inside a kernel is let through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
# Results, or shapes of results, that the host must know; `lift_fresh` is `torch.tensor(...)`.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.lift_fresh,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


class HostWaitsError(Exception):
    """An operation that waits."""


def _waits(operation, args, kwargs):
    if operation in INDEXING:
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if operation is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if operation is aten._to_copy:
        return kwargs.get("device", args[0].device) != args[0].device
    if operation is aten.copy_:
        return args[0].device != args[1].device
    return operation in WAITING


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func.overloadpacket, args, kwargs):
            raise HostWaitsError(str(func))
        return func(*args, **kwargs)


@contextmanager
def no_sync() -> Iterator[None]:
    """Lets operations fail that wait, or that copy between host and device."""
    run = GridExecutor.__call__

    def interpret(self, *args, **kwargs):
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", interpret), _Refusing():
        yield
