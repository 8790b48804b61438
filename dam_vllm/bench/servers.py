"""Servers under measurement: one model of random weights, stock and with masks."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dam_vllm.bench.masks import with_dynamic_heads
from dam_vllm.bench.model import Llama, write_model
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.server import Server

CACHE_BYTES = 1_000_000_000
RANK = 16


@dataclass(frozen=True)
class Setup:
    """What all servers of a measurement share.

    Attributes:
        shape: of the model.
        length: longest request in tokens.
        page: tokens a page.
        window: latest tokens that every head reads, beside the first one.
        arguments: further arguments of `vllm serve`.
        dynamic: KV heads of each layer that choose as many tokens more, by `RANK` channels.
    """

    shape: Llama
    length: int
    page: int
    window: int
    arguments: tuple[str, ...] = ()
    dynamic: int = 0


@contextmanager
def serve(
    setup: Setup, peers: Mapping[str, Mapping[str, object] | None]
) -> Iterator[tuple[dict[str, Server], MaskSet]]:
    """Starts one server a peer, all on all of this process's cores.

    Peers that are asked in turn do not disturb each other if there is a `rest` in between.

    Args:
        setup: what they share.
        peers: by name, the `dam` options beside the masks, or None for the stock backend.

    Yields:
        The servers by name, and the masks.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    with TemporaryDirectory(prefix="dam-bench-") as folder, ExitStack() as stack:
        model = write_model(Path(folder) / "model", setup.shape, setup.length)
        masks = _masks(setup, model)
        file = Path(folder) / "masks.safetensors"
        save_mask_set(masks, file)
        common = [
            "--load-format=dummy",
            f"--block-size={setup.page}",
            f"--max-model-len={setup.length}",
            f"--kv-cache-memory-bytes={CACHE_BYTES}",
            "--no-enable-prefix-caching",
            *setup.arguments,
        ]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores}
        servers = {}
        for name, options in peers.items():
            arguments = common if options is None else [*common, *_choice(file, options)]
            servers[name] = stack.enter_context(Server(model, arguments, environment, 600.0))
        yield servers, masks


def _masks(setup: Setup, model: Path) -> MaskSet:
    masks = streaming(str(model), 1, setup.window)
    return with_dynamic_heads(masks, setup.dynamic, setup.shape.head_size, RANK, setup.window - 1)


def _choice(masks: Path, options: Mapping[str, object]) -> list[str]:
    config = {"dam": {"masks": str(masks), **options}}
    return ["--attention-backend=dam", "--additional-config", json.dumps(config)]
