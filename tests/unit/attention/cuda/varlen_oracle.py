"""`flash_attn_varlen_func` written plainly, for what the kernel is asked here."""

import torch

from dam_vllm.attention.oracle import masked_attention


def varlen(
    *, q, k, v, out, cu_seqlens_q, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    softcap=0.0, num_splits=0, cu_seqlens_k=None, seqused_k=None, block_table=None,
    q_descale=None, k_descale=None, v_descale=None, return_softmax_lse=False, **unused,
):  # fmt: skip
    """Attention of packed sequences; the causal mask is aligned to the end.

    Keys lie in a paged cache where there is a block table, else one sequence after the other.
    FlashAttention refuses what is asserted here. With `return_softmax_lse` it gives the natural
    log-sum-exp too, float32 [heads, rows], not set in rows of no sequence.
    """
    assert not unused.keys() - {"fa_version", "scheduler_metadata"}
    assert causal
    # FlashAttention 3 takes a prefill of many short sequences with one KV head for few long ones,
    # and splits them (hopper/heuristics.h).
    # What has a schedule is a dense call as stock vLLM makes it, of as many sequences as requests.
    dense = block_table is None or "scheduler_metadata" in unused
    assert max_seqlen_q == 1 or dense or num_splits == 1
    assert block_table is None or k.shape[1] % 16 == 0
    assert cu_seqlens_q.is_contiguous()
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype
    factors = [q_descale, k_descale, v_descale]
    if q.dtype == torch.float8_e4m3fn:
        assert out.dtype == torch.bfloat16
        for each in factors:
            assert each.shape == (len(cu_seqlens_q) - 1, k.shape[-2])
            assert each.dtype == torch.float32
        # The same for all sequences and heads here.
        q, k, v = (part.float() * each[0, 0] for part, each in zip((q, k, v), factors, strict=True))
    else:
        assert out.dtype == q.dtype
        assert factors == [None, None, None]
    if block_table is None:
        assert seqused_k is None
        sequences = packed(k, v, cu_seqlens_k)
    else:
        assert cu_seqlens_k is None
        assert seqused_k.is_contiguous()
        assert block_table.stride(-1) == 1
        assert len(block_table) == len(seqused_k)
        sequences = paged(k, v, seqused_k, block_table)
    assert len(sequences) == len(cu_seqlens_q) - 1
    lse = torch.full((q.shape[1], len(q)), torch.nan, device=q.device)
    for row, (keys, values) in enumerate(sequences):
        first, last = cu_seqlens_q[row : row + 2].tolist()
        stop = len(keys)
        assert last - first <= max_seqlen_q
        assert stop <= max_seqlen_k
        if last == first:
            continue
        if stop == 0:
            out[first:last], lse[:, first:last] = 0, torch.inf
            continue
        query = torch.arange(first, last, device=q.device)[:, None] - last + stop
        mask = (torch.arange(stop, device=q.device) <= query).expand(q.shape[1], -1, -1)
        found = masked_attention(q[first:last], keys, values, mask, softmax_scale, softcap)
        out[first:last] = found.to(out.dtype)
        lse[:, first:last] = log_sum_exp(q[first:last], keys, mask, softmax_scale, softcap)
    return (out, lse) if return_softmax_lse else out


def log_sum_exp(query, key, mask, scale, softcap=0.0):
    """Of the scores that `masked_attention` weighs by: float32 [heads, queries]."""
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, float("-inf")).logsumexp(dim=-1)


def packed(k, v, starts):
    """Keys and values of sequences that follow each other."""
    assert starts.is_contiguous()
    return [(k[start:stop], v[start:stop]) for start, stop in starts.unfold(0, 2, 1).tolist()]


def paged(k, v, lens, block_table):
    """Keys and values of sequences in a paged cache, [pages, page, kv_heads, head_size]."""
    found = []
    for stop, table in zip(lens.tolist(), block_table, strict=True):
        pages = table[: -(-stop // k.shape[1])].long()
        keys, values = (part[pages].flatten(0, 1)[:stop] for part in (k, v))
        found.append((keys, values))
    return found
