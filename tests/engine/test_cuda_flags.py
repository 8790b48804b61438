"""What the CUDA backend says of itself to vLLM's validation."""

import pytest
import torch

pytestmark = pytest.mark.engine


@pytest.fixture
def refusals():
    """Function that gives vLLM's reasons against a configuration, as a Hopper GPU would."""
    from vllm.platforms.interface import DeviceCapability

    from dam_vllm.engine import cuda

    def ask(capability=(9, 0), **changed):
        asked = {
            "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 32,
            "use_mla": False, "has_sink": False, "use_sparse": False, "use_mm_prefix": False,
            "use_per_head_quant_scales": False, "attn_type": "decoder",
        }  # fmt: skip
        return cuda.DamCUDABackend.validate_configuration(
            device_capability=DeviceCapability(*capability), **asked | changed
        )

    return ask


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_what_fits_is_served(refusals, size):
    assert refusals(head_size=size) == []
    assert refusals(head_size=size, has_sliding_window=True, use_kv_connector=True) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability"),
        ({"dtype": torch.float32}, "dtype"),
        ({"head_size": 320}, "head_size"),
        ({"block_size": 24}, "block_size"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"),
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"has_sink": True}, "sinks"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head quant scales"),
        ({"attn_type": "encoder_only"}, "attention type"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_rswa": True}, "R-SWA"),
        ({"use_dcp": True}, "DCP"),
        ({"use_pcp": True}, "PCP"),
        ({"use_adaptive_verification": True}, "query lens mismatch"),
    ],
)
def test_what_does_not_fit_is_refused_by_vllms_own_validation(refusals, changed, reason):
    assert any(reason in told for told in refusals(**changed))
