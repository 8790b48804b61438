"""Lets vLLM on CPU take its Model Runner V2, whose kernels are Triton's, interpreted.

vLLM asks for Triton's CPU backend (vllm/triton_utils/importing.py), which the package on the index
does not hold; where the kernels are interpreted, its name is all that is looked for.
"""

import os
from types import SimpleNamespace

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
