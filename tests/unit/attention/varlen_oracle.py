"""`flash_attn_varlen_func` written plainly, for what the kernel is asked here."""

import torch

from dam_vllm.attention.naive import masked_attention


def varlen(
    *, q, k, v, out, cu_seqlens_q, seqused_k, block_table, max_seqlen_q, max_seqlen_k,
    softmax_scale, softcap, causal, **unused,
):  # fmt: skip
    """Attention of sequences in a paged cache; the causal mask is aligned to the end.

    FlashAttention refuses what is asserted here.
    """
    assert not unused.keys() - {"fa_version"}
    assert causal
    assert seqused_k.is_contiguous()
    assert cu_seqlens_q.is_contiguous()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype == out.dtype
    assert len(block_table) == len(seqused_k) == len(cu_seqlens_q) - 1
    for row, (stop, table) in enumerate(zip(seqused_k.tolist(), block_table, strict=True)):
        first, last = cu_seqlens_q[row : row + 2].tolist()
        assert last - first <= max_seqlen_q
        assert stop <= max_seqlen_k
        if last == first:
            continue
        if stop == 0:
            out[first:last] = 0
            continue
        pages = table[: -(-stop // k.shape[1])].long()
        keys, values = (part[pages].flatten(0, 1)[:stop] for part in (k, v))
        query = torch.arange(first, last)[:, None] - last + stop
        mask = (torch.arange(stop) <= query).expand(q.shape[1], -1, -1)
        found = masked_attention(q[first:last], keys, values, mask, softmax_scale, softcap)
        out[first:last] = found.to(out.dtype)
