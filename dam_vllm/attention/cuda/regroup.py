"""Queries and outputs head by head: copies between vLLM's order of rows and one of our own.

FlashAttention has one row stride for all sequences, so that a KV head's queries must follow each
other. torch's gather and scatter take six times as long for the same bytes.
"""

import torch
import triton
import triton.language as tl

TOKENS = 16


def gather_heads(query: torch.Tensor, heads: torch.Tensor, target: torch.Tensor) -> None:
    """Copies some KV heads' queries, head after head: one launch.

    Args:
        query: [tokens, heads, head_size]; a token's heads lie together.
        heads: int32 [n], KV heads.
        target: [n, tokens, heads_per_kv, head_size], contiguous, written.
    """
    _copy(query, target, heads, target.shape, query.stride(0), gathers=True)


def scatter_heads(source: torch.Tensor, heads: torch.Tensor, output: torch.Tensor) -> None:
    """The way back for outputs: one launch.

    Args:
        source: [n, tokens, heads_per_kv, head_size], contiguous.
        heads: int32 [n], KV heads.
        output: [tokens, heads, head_size], of which these heads are written.
    """
    _copy(source, output, heads, source.shape, output.stride(0), gathers=False)


def _copy(
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor,
    shape: torch.Size,
    row: int,
    gathers: bool,
) -> None:
    count, tokens, *each = shape
    width = each[0] * each[1]
    _copy_heads[(triton.cdiv(tokens, TOKENS), count)](
        source, target, heads, row, tokens, WIDTH=width, PADDED=triton.next_power_of_2(width),
        TOKENS=TOKENS, GATHERS=gathers, num_warps=8,
    )  # fmt: skip


# Rows are multiples of 16 bytes, so that vectors are too wherever they are cut out of a projection.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["head_ptr"])
def _copy_heads(
    source_ptr, target_ptr, head_ptr, row, tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one KV head; `row` lies between tokens where heads lie together."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    head = tl.load(head_ptr + number)
    channel = tl.arange(0, PADDED)
    held = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    together = (head * WIDTH + token * row)[:, None] + channel[None, :]
    apart = ((number * tokens + token) * WIDTH)[:, None] + channel[None, :]
    source, target = (together, apart) if GATHERS else (apart, together)
    tl.store(target_ptr + target, tl.load(source_ptr + source, mask=held), mask=held)
