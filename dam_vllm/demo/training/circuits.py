"""Structured initialisation: copying circuits wired in before training.

Random weights need far more training than a CPU gives until retrieval forms. Wired in are

- layer 0: each query head attends to one earlier offset and writes what stands there;
- layer 1: three KV groups attend to the previous position and pass on its neighbourhood;
- layer 2: the same three groups match the present neighbourhood with the passed-on ones
  (induction) and copy the token found;

all on a constant component that every embedding shares. Layer 3, the fourth groups of layers
1 and 2 and all MLPs start random. Attention sinks are not wired in.
"""

import math

import torch
from torch import Tensor

from dam_vllm.demo.training.network import Attention, Network, Shape, rope_frequencies

OFFSETS = (1, 2, 3, 4, 5, 6, 7, 9)
MATCHING_GROUPS = 3

_CONSTANT, _TOKEN_STD = 0.3, 0.03
# Score of a positional head at its offset, spread over the fastest rotary frequencies.
_POSITION_SCORES = (9.0, 9.0, 7.0, 5.0)
# The constant component's share of its first size after layer 0 has written.
_SHRUNK = 0.6


@torch.no_grad()
def wire(network: Network, seed: int) -> None:
    """Replaces a network's weights by the structured initialisation.

    Args:
        network: The network, changed in place.
        seed: Seed of the random parts.
    """
    _Wiring(network, torch.Generator().manual_seed(seed)).run()


class _Wiring:
    """One run of the initialisation: the network, its randomness and the constant direction."""

    def __init__(self, network: Network, generator: torch.Generator) -> None:
        self.network = network
        self.shape: Shape = network.shape
        self.generator = generator
        direction = self.normal(self.shape.width)
        self.constant = direction / direction.norm()
        self.outside = torch.eye(self.shape.width) - torch.outer(self.constant, self.constant)

    def run(self) -> None:
        size = self.shape.head_size
        heads_per_kv = self.shape.heads // self.shape.kv_heads
        self._embedding()
        self._random_layers()
        first, second, third = (layer.self_attn for layer in self.network.stack()[:3])
        constant = math.sqrt(self.shape.width) * _CONSTANT
        constant /= math.sqrt(_CONSTANT**2 + _TOKEN_STD**2 * self.shape.width)
        for head, offset in enumerate(OFFSETS):
            self._look_back(first, head, offset, constant)
            first.o_proj.weight[:, head * size : (head + 1) * size] = self.basis(size).T * 0.03
        for kv in range(MATCHING_GROUPS):
            written = self.basis(size).T
            for head in range(kv * heads_per_kv, (kv + 1) * heads_per_kv):
                self._look_back(second, head, 1, constant * _SHRUNK)
                second.o_proj.weight[:, head * size : (head + 1) * size] = 0
            head = kv * heads_per_kv
            second.o_proj.weight[:, head * size : (head + 1) * size] = written * 0.05
            self._match(third, second, kv, written)
        for head in range(self.shape.heads):
            kv = head // heads_per_kv
            read = third.v_proj.weight[kv * size : (kv + 1) * size]
            third.o_proj.weight[:, head * size : (head + 1) * size] = read.T * 0.12

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def basis(self, rows: int) -> Tensor:
        """Random orthonormal rows, (rows, width), without the constant direction."""
        q, _ = torch.linalg.qr(self.normal(self.shape.width, rows))
        return q.T @ self.outside

    def _embedding(self) -> None:
        tokens = self.normal(self.shape.vocabulary, self.shape.width) * _TOKEN_STD @ self.outside
        self.network.embed_tokens.weight.copy_(tokens + _CONSTANT * self.constant)

    def _random_layers(self) -> None:
        shape = self.shape
        for layer in self.network.stack():
            attention, mlp = layer.self_attn, layer.mlp
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.normal_(0, 0.02, generator=self.generator)
            values = [self.basis(shape.head_size) for _ in range(shape.kv_heads)]
            attention.v_proj.weight.copy_(torch.cat(values))
            out = self.outside @ self.normal(*attention.o_proj.weight.shape)
            attention.o_proj.weight.copy_(out / math.sqrt(out.shape[1]) * 0.01)
            for projection in (mlp.gate_proj, mlp.up_proj):
                weight = self.normal(*projection.weight.shape) / math.sqrt(shape.width)
                projection.weight.copy_(weight)
            down = self.outside @ self.normal(*mlp.down_proj.weight.shape)
            mlp.down_proj.weight.copy_(down / math.sqrt(shape.hidden) * 0.02)

    def _look_back(self, attention: Attention, head: int, offset: int, constant: float) -> None:
        """Makes a query head attend ``offset`` positions back, whatever stands there.

        Args:
            attention: The layer's attention.
            head: Query head.
            offset: Distance in positions.
            constant: Size of the constant component in the layer's normed input.
        """
        size, half = self.shape.head_size, self.shape.head_size // 2
        row, kv_row = head * size, head // (self.shape.heads // self.shape.kv_heads) * size
        frequencies = rope_frequencies(self.shape)
        for i, score in enumerate(_POSITION_SCORES):
            weight = math.sqrt(score * math.sqrt(size)) / constant * self.constant
            # A query turned back by the offset scores score * cos(f * (distance - offset)).
            angle = float(frequencies[i]) * -offset
            attention.k_proj.weight[kv_row + i] = weight
            attention.k_proj.weight[kv_row + half + i] = 0
            attention.q_proj.weight[row + i] = weight * math.cos(angle)
            attention.q_proj.weight[row + half + i] = weight * math.sin(angle)

    def _match(self, third: Attention, second: Attention, kv: int, written: Tensor) -> None:
        """Makes a KV head of layer 2 find the neighbourhood that layer 1 has passed on.

        The match uses the slow half of the rotary frequencies, which hardly see the distance.
        """
        size, half = self.shape.head_size, self.shape.head_size // 2
        slow = torch.tensor([i for i in range(size) if i % half >= half // 2])
        mixing = self.normal(len(slow), size) / math.sqrt(size) * 1.6
        third.k_proj.weight[kv * size + slow] = mixing @ written.T * 2
        heads_per_kv = self.shape.heads // self.shape.kv_heads
        for head in range(kv * heads_per_kv, (kv + 1) * heads_per_kv):
            read = second.v_proj.weight[kv * size : (kv + 1) * size]
            third.q_proj.weight[head * size + slow] = mixing @ read
