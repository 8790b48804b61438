"""Triton's interpreter: made fast enough for a suite, and enough for vLLM's Model Runner V2.

vLLM asks for Triton's CPU backend (vllm/triton_utils/importing.py), which the package on the index
does not hold; where the kernels are interpreted, its name is all that is looked for.
"""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}


def stand_in():
    """Before vLLM is imported: does what is needed where the variables of `V2` are set."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
        return
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))


def assert_runner(engine):
    """An engine took the runner that the variables ask for."""
    runner = type(engine.model_executor.driver_worker.worker.model_runner).__module__
    second = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    assert runner == ("vllm.v1.worker.cpu.model_runner" if second
                      else "vllm.v1.worker.cpu_model_runner")  # fmt: skip


def quicken():
    """Where kernels are interpreted: saves what takes most of the time.

    Every call of a function inside a kernel lets the interpreter replace all functions of the
    language anew, where once a launch is enough; sums are made twice to see whether 32 bits hold
    them; and a sort is a network of operations on elements.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def topk(x, k, dim=None):
        data = np.sort(x.handle.data, axis=-1)[..., ::-1][..., : int(k)].copy()
        handle = interpreter.TensorHandle(data, x.handle.dtype)
        return tl.core.tensor(handle, tl.block_type(x.dtype, list(data.shape)))

    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    tl.topk = topk
