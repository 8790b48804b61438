"""Functions compiled by LLVM for this processor, run by all of torch's threads.

vLLM for CPU brings llvmlite along (numba needs it); without it callers take torch.
"""

import ctypes
import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Compiled:
    """A compiled function.

    Attributes:
        call: takes its arguments, addresses and numbers; returns when all threads are done.
        engine: owns the function's memory.
    """

    call: Any
    engine: Any


def lanes() -> int:
    """Floats of a vector."""
    return 16 if has("avx512f") else 8


@functools.cache
def has(feature: str) -> bool:
    """Whether this processor has what LLVM calls so."""
    llvm = _llvm()
    return llvm is not None and bool(llvm.get_host_cpu_features().get(feature, False))


def compiles() -> bool:
    """Whether functions can be compiled: llvmlite is there, and OpenMP's threads can be had."""
    return _llvm() is not None and _parallel() is not None


def compiled(name: str, types: dict[str, str], declarations: str, body: str) -> Compiled:
    """Compiles a function.

    Args:
        name: of the function.
        types: of its arguments, all of 64 bits, by name.
        declarations: LLVM's text of what it calls.
        body: LLVM's text; begins where arguments, `%thread` and `%threads` (i64) are known in the
            block `%entry`, and ends with the block `done`.
    """
    llvm, parallel = _llvm(), _parallel()
    assert llvm is not None
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(function(name, types, declarations, body))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    address = ctypes.c_void_p(engine.get_function_address(name))

    def call(*arguments: int) -> None:
        given = (ctypes.c_int64 * len(arguments))(*arguments)
        parallel(address, given, torch.get_num_threads(), 0)

    return Compiled(call, engine)


def function(name: str, types: dict[str, str], declarations: str, body: str) -> str:
    """LLVM's text of a function that OpenMP calls in every thread with an array of arguments."""
    arguments = "\n".join(
        f"  %{argument}.given = getelementptr i64, ptr %arguments, i64 {at}\n"
        f"  %{argument} = load {kind}, ptr %{argument}.given, align 8"
        for at, (argument, kind) in enumerate(types.items())
    )
    return f"""
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
{declarations}

define void @{name}(ptr %arguments) #0 {{
entry:
{arguments}
  %thread.number = call i32 @omp_get_thread_num()
  %thread.count = call i32 @omp_get_num_threads()
  %thread = zext i32 %thread.number to i64
  %threads = zext i32 %thread.count to i64
{body}
done:
  ret void
}}
attributes #0 = {{ nounwind "min-legal-vector-width"="{32 * lanes()}" }}
"""


@functools.cache
def _llvm() -> ModuleType | None:
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None
    # Asked for its `__dict__`, llvmlite's library answers with a function of that name, over which
    # vLLM falls where another engine starts in the process (triton_utils/dispatcher.py, which goes
    # through the attributes of all modules).
    llvm.ffi.lib._fntab["__dict__"] = {}
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@functools.cache
def _parallel() -> Any:
    """Runs a function on the threads of torch's OpenMP, or None.

    GNU's entry, which LLVM's and Intel's OpenMP have too.
    """
    process = ctypes.CDLL(None)
    if not (hasattr(process, "GOMP_parallel") and hasattr(process, "omp_get_thread_num")):
        return None
    parallel = process.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
