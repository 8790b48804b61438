"""FlashAttention's interface, loaded beside a stand-in for its library."""

import importlib.util
import lzma
from pathlib import Path

import pytest
import torch

from dam_vllm.bench import fa3
from dam_vllm.bench.checks import fa3_option
from dam_vllm.bench.fa3 import INTERFACE, LIBRARY, load
from dam_vllm.bench.gpu_case import Case, draw, geometry
from dam_vllm.bench.peers import flash_calls, sdpa_calls
from dam_vllm.options import OptionError
from tests.unit.attention.cuda.varlen_oracle import varlen

# As `_vllm_fa3_C.abi3.so` of vLLM 0.26 registers them.
FWD = """fwd(Tensor(a!) q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v,
    Tensor(b!)? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new,
    Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k,
    Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
    Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale,
    Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left,
    int window_size_right, float softcap, bool is_rotary_interleaved,
    Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
    int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
SCHEDULE = """get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k,
    int num_heads, int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype,
    Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new,
    Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal,
    int window_size_left, int window_size_right, bool has_softcap, int num_splits,
    bool? pack_gqa, int sm_margin) -> Tensor"""


def interface():
    """vLLM's own file, which is read but not imported."""
    spec = importlib.util.find_spec("vllm")
    file = spec and Path(spec.submodule_search_locations[0], "vllm_flash_attn", INTERFACE)
    if not file or not file.is_file():
        pytest.skip("vLLM is not installed")
    return file.read_text()


def forward(*given):
    schema = torch.ops._vllm_fa3_C.fwd.default._schema
    named = {each.name: value for each, value in zip(schema.arguments, given, strict=True)}
    assert (named["scheduler_metadata"] is None) == (named["page_table"] is None)
    names = ("q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q")
    varlen(
        **{name: named[name] for name in (*names, "max_seqlen_k", "softmax_scale", "softcap")},
        causal=named["is_causal"],
        block_table=named["page_table"],
    )
    return [torch.empty(0) for _ in range(4)]


@pytest.fixture
def library():
    """Registers operators under the library's name."""
    found = torch.library.Library("_vllm_fa3_C", "FRAGMENT")
    found.define(" ".join(FWD.split()))
    found.define(" ".join(SCHEDULE.split()))
    found.impl("fwd", forward, "CPU")
    found.impl("get_scheduler_metadata", lambda *given: torch.tensor(7), "CPU")
    yield found
    found._destroy()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_interface_is_called_as_the_library_takes_it(tmp_path, monkeypatch, library, phase, packed):
    (tmp_path / INTERFACE).write_text(interface())
    content = lzma.compress(b"library") if packed else b"library"
    (tmp_path / f"{LIBRARY}{'.xz' * packed}").write_bytes(content)
    loaded = []
    monkeypatch.setattr(
        torch.ops, "load_library", lambda path: loaded.append(Path(path).read_bytes())
    )
    fa3_option(tmp_path)
    flash = load(tmp_path)
    assert loaded == [b"library"]
    assert str(tmp_path) in flash.origin
    case, device = Case(phase, 4, 2, 16, 32, 256, 1), torch.device("cpu")
    inputs, where = draw(case, device), geometry(case, device)
    (found,), (wanted,) = (
        flash_calls(case, where, inputs, flash, phase == "decode"),
        sdpa_calls(case, inputs),
    )
    torch.testing.assert_close(found(), wanted(), atol=2e-2, rtol=2e-2)


def test_what_does_not_load_says_so(tmp_path, monkeypatch):
    (tmp_path / INTERFACE).write_text("")
    (tmp_path / LIBRARY).write_bytes(b"no library")
    with pytest.raises(ImportError, match="does not load"):
        load(tmp_path)
    monkeypatch.setattr(fa3.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="no --fa3 was given"):
        load(None)


def test_folder_is_checked(tmp_path):
    fa3_option(None)
    (tmp_path / INTERFACE).write_text("")
    with pytest.raises(OptionError, match=r"--fa3 is .*must be a folder with"):
        fa3_option(tmp_path)
