"""What tests make of the oracle's parts."""

from dam_vllm.attention.oracle import chosen_mask


def dynamic_mask(masks, layer, head, query, key, static, page, scale, softcap=0.0):
    """The mask of one dynamic KV head's queries: static pages and chosen ones.

    Takes what `chosen_mask` takes.

    Returns:
        bool [queries, keys], causal.
    """
    return static | chosen_mask(masks, layer, head, query, key, static, page, scale, softcap)
