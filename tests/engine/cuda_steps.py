"""Steps over a random paged cache for the CUDA backend's own code, and what they must give."""

import numpy as np
import torch

from dam_vllm.attention.oracle import exact_mask, masked_attention, page_mask
from tests.oracle import dynamic_mask

SIZE, PAGE, HEADS, KV_HEADS, LONGEST = 64, 32, 6, 3, 1024
NAME = "model.layers.0.self_attn.attn"
GROUP = HEADS // KV_HEADS
QUERY_SCALE, KEY_SCALE, VALUE_SCALE = 0.03, 0.5, 0.25
FP8 = torch.float8_e4m3fn
# What FlashAttention takes itself, where there is a GPU.
OWN = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# Tokens up to the last query, and queries; vLLM puts requests with one query first.
MIXED = ((300, 1), (65, 1), (411, 250), (129, 129), (5, 5), (271, 2))
DECODE = ((391, 1), (1, 1), (640, 1), (64, 1))


class Steps:
    """A paged cache with poison where nothing is stored, and steps over it.

    Where there is a drift, 64 tokens after each other are alike.
    """

    def __init__(self, rng, device, dtype, stored, page=PAGE, drift=0.0):
        self.rng, self.device, self.dtype, self.stored = rng, device, dtype, stored
        self.drift = drift
        self.blocks, self.page = 64, page
        shape = (self.blocks, KV_HEADS, self.page, 2 * SIZE)
        self.cache = torch.full(shape, torch.nan).to(stored or dtype).to(device)

    def step(self, served, requests):
        """Stores new random requests and gives vLLM's metadata for their last queries."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [-(-stop // self.page) for stop, _ in requests]
        order = self.rng.permutation(self.blocks)
        table = torch.full((len(requests), LONGEST // self.page), 2**30, dtype=torch.int32)
        self.requests, self.keys, self.values = requests, [], []
        for row, (stop, _) in enumerate(requests):
            pages, order = torch.from_numpy(order[: counts[row]].copy()), order[counts[row] :]
            table[row, : counts[row]] = pages
            alike = self.drift * torch.randn(2, -(-stop // 64), KV_HEADS, SIZE)
            each = torch.randn(2, stop, KV_HEADS, SIZE) + alike[:, torch.arange(stop) // 64]
            key, value = each.to(self.dtype)
            rotation = served.impl.rotation
            if rotation is not None:
                key = rotation.keys(key.to(self.device)).cpu()
            both = torch.cat([key, value], dim=-1).to(self.cache.dtype)
            token = torch.arange(stop)
            self.cache[pages[token // self.page], :, token % self.page] = both.to(self.device)
            self.keys.append(both[..., :SIZE].float())
            self.values.append(both[..., SIZE:].float())
        new = np.array([count for _, count in requests])
        starts = torch.from_numpy(np.concatenate([[0], new.cumsum()])).int()
        lens = torch.tensor([stop for stop, _ in requests], dtype=torch.int32)
        self.query = torch.randn(int(new.sum()), HEADS, SIZE).to(self.dtype).to(self.device)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device), query_start_loc_cpu=starts,
            seq_lens=lens.to(self.device), num_reqs=len(requests),
            num_actual_tokens=int(new.sum()), max_query_len=int(new.max()),
            max_seq_len=int(lens.max()), block_table_tensor=table.to(self.device),
            slot_mapping=torch.zeros(int(new.sum()), dtype=torch.int64, device=self.device),
            seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip

    def run(self, served, metadata):
        cache = self.cache.view(torch.uint8) if self.stored else self.cache
        output, query = torch.full_like(self.query, torch.nan), self.query
        if self.stored and served.impl.asks:
            query = (query / QUERY_SCALE).to(FP8)  # by vLLM's layer
        served.impl.forward(served.layer, query, None, None, cache, metadata, output)
        return output.float().cpu()

    def expected(self, served, granularity="page", dense_below=0, softcap=0.0):
        """The oracle's output for the requests of the last step."""
        rows, first = [], 0
        rotation = served.impl.rotation
        query = self.query
        if served.impl.quantises:
            query = served.impl.prepared(served.layer, query, True).float() * QUERY_SCALE
        elif rotation is not None:
            query = rotation.queries(query, KV_HEADS)
        if self.stored and served.impl.asks:
            query = (query / QUERY_SCALE).to(FP8).float() * QUERY_SCALE
        query = query.cpu()
        scales = (KEY_SCALE, VALUE_SCALE) if self.stored else (1.0, 1.0)
        tails = [] if served.masks.tails is None else served.masks.tails[0].nonzero()[0].tolist()
        for (stop, count), key, value in zip(self.requests, self.keys, self.values, strict=True):
            asked = query[first : first + count]
            key, value = key * scales[0], value * scales[1]
            args = (served.masks, 0, stop - count, stop)
            if granularity == "token":
                mask = exact_mask(*args, self.page, dense_below)
            else:
                mask = page_mask(*args, self.page, dense_below)
            if rotation is not None:
                static = page_mask(*args, self.page, dense_below, self.page)
                for head in rotation.heads.tolist():
                    own = slice(head * GROUP, (head + 1) * GROUP)
                    mask[own] = dynamic_mask(
                        served.masks, 0, head, asked.unflatten(1, (KV_HEADS, GROUP))[:, head],
                        key[:, head], static[head * GROUP], self.page, 0.17, softcap,
                    )  # fmt: skip
            mask = torch.from_numpy(mask)
            rows.append(masked_attention(asked, key, value, mask, 0.17, softcap, tails, self.page))
            first += count
        return torch.cat(rows)
