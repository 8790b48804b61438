"""What anchors chose in a step, kept from their layer to those whose heads reuse it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.sharding import Shard

Anchor = tuple[int, int]
"""Global layer index and local KV head."""

Choice = TypeVar("Choice")


@dataclass
class ChosenPages(Generic[Choice]):
    """What anchors chose in the step at hand.

    A worker has one for all its layers, since a follower may lie in another cache group of vLLM
    than its anchor, with a plan of its own. Layers run in order, so an anchor has chosen for this
    step before any follower asks.

    Attributes:
        last: by anchor, the last layer that reads its choice.
        page: tokens a page in these layers, once that is known.
    """

    last: Mapping[Anchor, int] = field(default_factory=dict)
    page: int | None = None
    _kept: dict[Anchor, Choice] = field(default_factory=dict)

    @classmethod
    def of_masks(cls, masks: MaskSet, shard: Shard) -> "ChosenPages[Choice]":
        """Nothing yet, for all layers of one rank."""
        last = {}
        for layer in range(masks.layers):
            for head in shard.reusing_heads(masks, layer):
                last[shard.anchor(masks, layer, head)] = layer
        return cls(last)

    def keep(self, layer: int, choices: Mapping[int, Choice]) -> None:
        """Keeps what heads of a layer chose, by local KV head, where another follows."""
        for head, choice in choices.items():
            if (layer, head) in self.last:
                self._kept[layer, head] = choice

    def of(self, anchors: Iterable[Anchor]) -> list[Choice]:
        """What anchors chose, in their order."""
        return [self._kept[anchor] for anchor in anchors]

    def drop(self, layer: int) -> None:
        """Lets go what no layer after this one reads."""
        for anchor in [anchor for anchor in self._kept if self.last[anchor] <= layer]:
            del self._kept[anchor]
