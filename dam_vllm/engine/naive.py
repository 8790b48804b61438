"""`kernel: naive`: serves by the float32 oracle, request by request. Slow, for debugging."""

from dataclasses import dataclass
from typing import Any

import torch

from dam_vllm.attention.oracle import dynamic_mask, exact_mask, masked_attention, page_mask
from dam_vllm.engine.checks import Serving
from dam_vllm.engine.shards import Shard

FP8_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class NaiveBatch:
    """What the oracle needs of a layer.

    Attributes:
        serving: options and masks.
        layer: global layer index.
        shard: KV heads of this rank.
    """

    serving: Serving
    layer: int
    shard: Shard

    def mask(self, query: torch.Tensor, key: torch.Tensor, page: int, impl: Any) -> torch.Tensor:
        """Mask of one request's queries.

        Args:
            query: [queries, local heads, head_size], rotated where a head is dynamic.
            key: [keys, local kv_heads, head_size], rotated likewise.
            page: tokens a page.
            impl: the attention implementation, for scale and soft-capping.

        Returns:
            bool [local heads, queries, keys].
        """
        masks, options = self.serving.masks, self.serving.options
        start, stop = len(key) - len(query), len(key)
        group = masks.heads // masks.kv_heads
        local = slice(self.shard.start * group, self.shard.stop * group)
        if options.granularity == "token":
            whole = exact_mask(masks, self.layer, start, stop, options.dense_below)
        else:
            whole = page_mask(masks, self.layer, start, stop, page, options.dense_below)
        whole = whole[local]
        dynamic = self.shard.dynamic_heads(masks, self.layer)
        if dynamic:
            static = page_mask(masks, self.layer, start, stop, page, options.dense_below, page)
            static = static[local]
            grouped = query.view(len(query), -1, group, query.shape[-1])
            for head in dynamic:
                whole[head * group : (head + 1) * group] = dynamic_mask(
                    masks, self.layer, self.shard.start + head, grouped[:, head], key[:, head],
                    static[head * group], page, impl.scale, impl.logits_soft_cap,
                )  # fmt: skip
        return torch.from_numpy(whole)


def serve_naive(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """Computes a layer's attention from the paged cache by the oracle.

    Args:
        impl: the attention implementation, for scale, soft-capping and cache dtype.
        layer: the attention layer, for its name and scales.
        query: [tokens, heads, head_size], rotated where a head is dynamic.
        kv_cache: [blocks, kv_heads, page, 2 * head_size], see `read_pages`.
        metadata: the step's metadata.
        output: [tokens, heads, head_size] or flat; written.
    """
    batch: NaiveBatch = metadata.naive[layer.layer_name]
    page = kv_cache.shape[2]
    starts = metadata.query_start_loc.tolist()
    rows = output.view(query.shape)
    scaled = impl.kv_cache_dtype in FP8_DTYPES
    for request, stop in enumerate(metadata.seq_lens.tolist()):
        first, last = starts[request : request + 2]
        table = metadata.block_table[request, : -(-stop // page)].long()
        pages = kv_cache[table].cpu()
        keys, values = read_pages(pages, impl.kv_cache_dtype, impl.keys_by_channel)
        keys, values = keys[:stop], values[:stop]
        if scaled:
            keys, values = keys * layer._k_scale_float, values * layer._v_scale_float
        asked = query[first:last].cpu()
        mask = batch.mask(asked, keys, page, impl)
        found = masked_attention(asked, keys, values, mask, impl.scale, impl.logits_soft_cap)
        rows[first:last] = found.to(rows)


def read_pages(
    pages: torch.Tensor, cache_dtype: str, keys_by_channel: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pages in order.

    On CUDA a page holds each token's key and value. In the plain layout of the CPU's kernels
    ("vec") it holds keys channel by channel, [head_size, page], then values token by token,
    [page, head_size].

    Args:
        pages: [pages, kv_heads, page, 2 * head_size].
        cache_dtype: vLLM's name of the cache's dtype.
        keys_by_channel: whether the layout is that of the CPU's kernels.

    Returns:
        Two tensors, each float32 [pages * page, kv_heads, head_size]; fp8 is not yet scaled.
    """
    count, kv_heads, page, width = pages.shape
    stored = pages.view(FP8_DTYPES.get(cache_dtype, pages.dtype))
    if keys_by_channel:
        flat = stored.reshape(count, kv_heads, 2, page * width // 2)
        keys = flat[:, :, 0].view(count, kv_heads, width // 2, page).transpose(2, 3)
        values = flat[:, :, 1].view(count, kv_heads, page, width // 2)
    else:
        keys, values = stored.split(width // 2, dim=-1)
    shape = (count * page, kv_heads, width // 2)
    return (
        keys.float().transpose(1, 2).reshape(shape),
        values.float().transpose(1, 2).reshape(shape),
    )
