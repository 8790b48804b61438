"""Passes of a text that begin at a layer and a row: what is before is computed once for all."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from transformers import DynamicCache


class Suffix:
    """The end of a text in a prepared model, and in its last layers.

    The text before, and the layers before, are as under full attention.

    Args:
        model: the decoder; all its layers have attention, where some text is before.
        ids: the text.
        rows: positions whose logits are wanted.
        first: row that passes begin with.
    """

    def __init__(self, model: Any, ids: list[int], rows: list[int], first: int = 0) -> None:
        self._model, self._ids, self._first = model, ids[first:], first
        self._rows = [row - first for row in rows]
        self._layers = decoder_layers(model)
        self._done = 0
        # What the last layer that is done returned: a tensor, or a tuple in some models.
        self._returned: Any = None
        self._cache = DynamicCache() if first else None
        if first:
            _compute(model, ids[:first], [first - 1], self._cache)

    def skip(self, layer: int) -> None:
        """Computes the layers before `layer` that are not done; none is given up again."""
        if not self._done < layer <= len(self._layers):
            return
        skipped = [*self._layers[: self._done], *self._layers[layer:]]
        with self._skipping(skipped), self._layers[layer - 1].register_forward_hook(self._keep):
            self._run()
        self._done = layer

    def logits(self) -> torch.Tensor:
        """Runs the layers that are not done, hooked as the caller has it.

        Returns:
            float32 [rows, vocabulary].
        """
        with self._skipping(self._layers[: self._done]):
            return self._run()

    def _run(self) -> torch.Tensor:
        cache = copy(self._cache)
        if cache is not None:
            # Layers put new tensors in place of theirs.
            cache.layers = [copy(layer) for layer in cache.layers]
        return _compute(self._model, self._ids, self._rows, cache)

    @contextmanager
    def _skipping(self, layers: Sequence[Any]) -> Iterator[None]:
        """Lets layers return what was kept."""
        # What places a model on devices may have replaced `forward` too.
        own = [vars(layer).get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.forward = lambda *given, **also: self._returned
            yield
        finally:
            for layer, before in zip(layers, own, strict=True):
                if before is None:
                    del layer.forward
                else:
                    layer.forward = before

    def _keep(self, layer: Any, given: Any, returned: Any) -> None:
        self._returned = returned


def _compute(
    model: Any, ids: list[int], rows: list[int], cache: DynamicCache | None
) -> torch.Tensor:
    """Logits float32 [rows, vocabulary] of tokens after those in a cache."""
    inputs, kept = (torch.tensor(each, device=model.device) for each in ([ids], rows))
    with torch.inference_mode():
        found = model(
            input_ids=inputs, past_key_values=cache, use_cache=cache is not None,
            logits_to_keep=kept,
        )  # fmt: skip
    return torch.as_tensor(found.logits[0]).float()


def decoder_layers(model: Any) -> Sequence[Any]:
    """A decoder's layers in order; empty where they are not found, and all are always computed."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        long = isinstance(module, torch.nn.ModuleList) and len(module) == count
        if long and all(_index(layer) == row for row, layer in enumerate(module)):
            return list(module)
    return []


def _index(layer: Any) -> int | None:
    """Which layer of the model this is, as its attention (or what stands for it) knows."""
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((index for index in found if index is not None), None)
