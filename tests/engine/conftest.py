"""The CUDA backend's own code: on a GPU, or on this processor with Triton's interpreter.

What a GPU alone has is replaced where there is none: FlashAttention by an oracle, which also takes
float32 where it is, and the kernel that stores keys by plain indexing.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dam_vllm.demo import model_dir
from dam_vllm.options import DamOptions
from tests.engine.cuda_steps import (
    GROUP,
    HEADS,
    KEY_SCALE,
    KV_HEADS,
    LONGEST,
    NAME,
    PAGE,
    QUERY_SCALE,
    SIZE,
    VALUE_SCALE,
)  # fmt: skip
from tests.unit.attention.cuda.varlen_oracle import varlen


@pytest.fixture
def backend(monkeypatch, random_masks, device):
    """Function that makes the backend's builder and implementation for one layer."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

    from dam_vllm.engine import backend as shared
    from dam_vllm.engine import cuda, cuda_builder, cuda_layers
    from dam_vllm.engine.serving import Serving
    from dam_vllm.masks.sharding import Shard

    stock = getattr(flash_attn, "flash_attn_varlen_func", None)

    def make(
        dtype=torch.float32, stored=None, softcap=0.0, mode="static", padded=None, masks=None,
        local=(0, KV_HEADS), shares=None, version=None, page=PAGE, **options,
    ):  # fmt: skip
        masks = masks or random_masks(
            layers=1, heads=HEADS, kv_heads=KV_HEADS, pcl=150, share=0.01,
            dense=mode == "static", dynamic=mode == "dynamic", head_size=SIZE,
        )  # fmt: skip
        kv_heads = local[1] - local[0]
        serving = Serving(DamOptions(**options), Path("masks"), masks)
        for module in (cuda, cuda_builder, cuda_layers, shared):
            monkeypatch.setattr(module, "admit", lambda config: serving)
        for module in (cuda_layers, shared):
            monkeypatch.setattr(module, "shard", lambda count: Shard(*local))
        if version is not None:
            monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *a, **given: version)
            schedule = {"get_scheduler_metadata": lambda **given: torch.zeros(5)}
            monkeypatch.setattr(flash_attn, *schedule.popitem(), raising=False)
        monkeypatch.setattr(cuda_builder, "log_masks", lambda *args: None)
        refused = stock is None or dtype == torch.float32
        if refused and getattr(flash_attn, "flash_attn_varlen_func", None) is stock:
            monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", varlen, raising=False)
        monkeypatch.setattr(
            flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **kwargs: True
        )
        name = "fp8_e4m3" if stored else "auto"
        config = EngineArgs(
            model=str(model_dir()),
            max_model_len=LONGEST,
            block_size=page,
            max_num_seqs=6,
            kv_cache_dtype=name,
            dtype=str(dtype).removeprefix("torch."),
        ).create_engine_config()
        with set_current_vllm_config(config):
            made = cuda.DamCUDAImpl(
                kv_heads * GROUP // Shard(*local).parts, SIZE, 0.17, kv_heads, None, None, name,
                logits_soft_cap=softcap, kv_sharing_target_layer_name=shares,
            )  # fmt: skip
        scales = {"q": QUERY_SCALE, "k": KEY_SCALE, "v": VALUE_SCALE}
        floats = {f"_{part}_scale_float": scale for part, scale in scales.items()}
        tensors = {
            f"_{part}_scale": torch.tensor(scale, device=device) for part, scale in scales.items()
        }
        layer = SimpleNamespace(impl=made, layer_name=NAME, **floats, **tensors)
        config.compilation_config.static_forward_context[NAME] = layer
        spec = FullAttentionSpec(
            block_size=page, num_kv_heads=kv_heads, head_size=SIZE, dtype=stored or dtype,
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if stored else KVQuantMode.NONE,
            page_size_padded=padded,
        )  # fmt: skip
        made.rotation = made.rotations.of_layer(masks, 0, Shard(*local), device)
        made.counts = made.counting([0], kv_heads, local[0], device)
        monkeypatch.setattr(shared, "set_up_layers", lambda config: None)
        made.asks = made.supports_quant_query_input
        made.process_weights_after_loading(dtype)
        builder = cuda_builder.DamCUDAMetadataBuilder(spec, [NAME], config, device)
        return SimpleNamespace(builder=builder, impl=made, layer=layer, masks=masks)

    return make
