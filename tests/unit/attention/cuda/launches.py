"""What a step launches, and what Triton compiles or would compile for it."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

# Operations that launch nothing on a GPU: views, and memory alone.
FREE = {
    "view", "_unsafe_view", "slice", "select", "transpose", "unsqueeze", "squeeze", "split",
    "detach", "alias", "as_strided", "expand", "permute", "t", "unbind", "empty", "new_empty",
    "empty_like", "new_empty_strided", "empty_strided", "_reshape_alias", "narrow",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts launches by name; what a peer's oracle does inside counts as one.

    Attributes:
        all: of torch, Triton and FlashAttention.
        triton: of Triton alone.
    """

    def __init__(self):
        super().__init__()
        self.all, self.triton = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.all.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        from dam_vllm.attention.cuda import flash

        execute, call, launch = GridExecutor.__call__, flash._call, JITFunction.run

        def compiled(kernel, *args, **kwargs):
            self.triton.append(kernel.fn.__name__)
            self.all.append(kernel.fn.__name__)
            return launch(kernel, *args, **kwargs)

        def interpret(executor, *args, **kwargs):
            self.triton.append(executor.fn.__name__)
            self.all.append(executor.fn.__name__)
            with _disable_current_modes():
                return execute(executor, *args, **kwargs)

        def attend(*args, **kwargs):
            self.all.append("flash")
            with _disable_current_modes():
                return call(*args, **kwargs)

        self._patches = [
            patch.object(GridExecutor, "__call__", interpret),
            patch.object(JITFunction, "run", compiled), patch.object(flash, "_call", attend),
        ]  # fmt: skip
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for each in self._patches:
            each.stop()


def compiled(kernels):
    """How many variants of kernels a GPU holds."""
    caches = [cache for kernel in kernels for cache in kernel.device_caches.values()]
    return sum(len(cache[0]) for cache in caches)


def signature(kernel, seen):
    """The kernel, adding to `seen` what Triton would compile each launch for.

    By triton/runtime/jit.py: types of tensors and whether 16 bytes divide their addresses, whether
    integers are 1 or divided by 16, and constants; less what the kernel's decorator leaves out.
    """
    given = kernel.kwargs
    fixed = set(given.get("do_not_specialize") or ())
    unaligned = set(given.get("do_not_specialize_on_alignment") or ())
    constants = {
        name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)
    }

    def told(name, value):
        if isinstance(value, torch.Tensor):
            aligned = name in unaligned or value.data_ptr() % 16
            return value.dtype, "any" if name in unaligned else aligned == 0
        if value is None or name in constants:
            return value
        if isinstance(value, float) or name in fixed:
            return type(value)
        return type(value), value == 1, value % 16 == 0

    class Told:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                options = {"num_warps", "num_stages"}
                named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                kept = [(name, named[name]) for name in sorted(named.keys() - options)]
                seen.add((kernel.fn.__name__, *((name, told(name, each)) for name, each in kept)))
                return kernel[grid](*args, **kwargs)

            return launch

        def __call__(self, *args, **kwargs):
            return kernel(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(kernel, name)

    return Told()


def new(seen, warmed):
    """What was not compiled before: kernels, and the parameters that differ from the nearest."""
    found = []
    for name, *told in seen - warmed:
        known = [each[1:] for each in warmed if each[0] == name]
        found.append((name, min(([*set(told) - set(each)] for each in known), key=len, default=())))
    return found
