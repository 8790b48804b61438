"""What a model's configuration says about its attention: layers, heads and windows."""

from dataclasses import dataclass
from typing import Any

from dam_vllm.masks.mask_set import LayerType

LAYER_KINDS: dict[str, LayerType] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
}


@dataclass(frozen=True)
class ModelShape:
    """A model's attention.

    Attributes:
        layer_types: of each layer.
        heads: query heads.
        kv_heads: KV heads.
        max_length: positions, or None where the configuration does not tell.
        head_size: channels a head, or None likewise.
    """

    layer_types: list[LayerType]
    heads: int
    kv_heads: int
    max_length: int | None
    head_size: int | None


def model_shape(config: Any) -> ModelShape:
    """Reads a transformers configuration (of a whole model, or of its text part).

    Args:
        config: a `PretrainedConfig`.

    Returns:
        The shape of the model's decoder attention.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    hidden = getattr(text, "hidden_size", None)
    types = getattr(text, "layer_types", None)
    if types is not None:
        layer_types: list[LayerType] = [LAYER_KINDS.get(kind, "other") for kind in types]
    else:
        window = getattr(text, "sliding_window", None)
        windowed = window is not None and getattr(text, "use_sliding_window", True)
        layer_types = ["sliding" if windowed else "full"] * text.num_hidden_layers
    return ModelShape(
        layer_types=layer_types,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        max_length=getattr(text, "max_position_embeddings", None),
        head_size=getattr(text, "head_dim", None) or (hidden and hidden // heads),
    )
