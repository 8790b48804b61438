"""Servers under measurement: one model of random weights, stock and with masks."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dam_vllm.bench.masks import scattered_masks, with_dynamic_heads
from dam_vllm.bench.model import Model, write_model
from dam_vllm.bench.weights import write_weights
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.options import OptionError
from dam_vllm.server import Server

CHANNELS = 16
START_SECONDS = 1200.0
# A step of a whole prompt may take longer than the 300 s after which vLLM gives up.
PATIENCE = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "7200"}
# Of a server beside weights and cache: libraries, activations, CUDA graphs.
OVERHEAD_BYTES = {"cpu": 3_000_000_000, "cuda": 8_000_000_000}
# Of a GPU's memory, shared out to the servers that run at a time.
UTILISATION = 0.9

Peers = Mapping[str, Mapping[str, object] | None]


@dataclass(frozen=True)
class Setup:
    """What all servers of a measurement share.

    Attributes:
        model: shape of the model.
        length: longest request in tokens.
        page: tokens a page.
        window: latest tokens that every head reads, beside the first one.
        requests: how many of the longest ones the KV cache holds.
        arguments: further arguments of `vllm serve`.
        dynamic: KV heads of each layer that choose pages, by `CHANNELS` channels.
        density: of masks at random distances in place of the window, or None.
        masks: mask file in place of both, or None.
    """

    model: Model
    length: int
    page: int
    window: int
    requests: int = 8
    arguments: tuple[str, ...] = ()
    dynamic: int = 0
    density: float | None = None
    masks: Path | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache; vLLM keeps a page to itself."""
        pages = self.requests * ceil_div(self.length, self.page) + 1
        return pages * self.page * self.model.token_bytes

    @property
    def server_bytes(self) -> int:
        """Bytes that a server takes, roughly."""
        return self.model.weight_bytes + self.cache_bytes + OVERHEAD_BYTES[device()]


def in_turns(setup: Setup, peers: Peers, free: int) -> list[Peers]:
    """Which servers run at a time: all of them, or, where memory is short, each alone.

    Args:
        setup: what they share.
        peers: as `serve` takes them.
        free: bytes of memory.

    Returns:
        Groups of peers that are started one after the other.

    Raises:
        OptionError: if not even one server fits.
    """
    if setup.server_bytes > free:
        raise OptionError(
            f"--lengths and --concurrency ask for {setup.requests} x {setup.length} tokens: a "
            f"server takes {setup.server_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )
    if len(peers) * setup.server_bytes <= free:
        return [peers]
    return [{name: options} for name, options in peers.items()]


def device() -> str:
    """What vLLM serves on here, "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory() -> int:
    """Free bytes of the GPU's memory, or of the machine's where there is none."""
    if device() == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    (line,) = (
        line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line
    )
    return 1024 * int(line.split()[1])


@contextmanager
def serve(setup: Setup, peers: Peers) -> Iterator[tuple[dict[str, Server], MaskSet]]:
    """Starts one server a peer, all on all of this process's cores.

    Peers that are asked in turn do not disturb each other: an idle one sleeps after a second, and
    the client takes longer to start.

    Args:
        setup: what they share.
        peers: by name, the `dam` options beside the masks, or None for the stock backend.

    Yields:
        The servers by name, and the masks.

    Raises:
        OptionError: if the masks are another model's.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    with TemporaryDirectory(prefix="dam-bench-") as folder, ExitStack() as stack:
        model = write_model(Path(folder) / "model", setup.model, setup.length)
        masks = masks_of(setup, model)
        file = Path(folder) / "masks.safetensors"
        save_mask_set(masks, file)
        if masks.dynamic is not None:
            write_weights(model, setup.model)
        common = [
            f"--load-format={'dummy' if masks.dynamic is None else 'auto'}",
            f"--block-size={setup.page}",
            f"--max-model-len={setup.length}",
            f"--kv-cache-memory-bytes={setup.cache_bytes}",
            f"--gpu-memory-utilization={UTILISATION / len(peers):.3f}",
            "--no-enable-prefix-caching",
            *setup.arguments,
        ]
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, **PATIENCE}
        servers = {}
        for name, options in peers.items():
            arguments = common if options is None else [*common, *_choice(file, options)]
            servers[name] = stack.enter_context(
                Server(model, arguments, environment, START_SECONDS)
            )
        yield servers, masks


def masks_of(setup: Setup, model: Path) -> MaskSet:
    """The masks that a setup asks for.

    Args:
        setup: the measurement's.
        model: folder of the model that it serves.

    Returns:
        The mask set, for any weights of that shape.

    Raises:
        OptionError: if the mask file is another model's.
    """
    if setup.masks is not None:
        found = load_mask_set(setup.masks)
        identity = fingerprint(str(model), weights=False)
        if found.header.fingerprint.config != identity.config:
            raise OptionError(
                f"--masks is {str(setup.masks)!r}: was made for {found.header.model}, whose shape "
                "is not --model's"
            )
        return replace(found, header=found.header.model_copy(update={"fingerprint": identity}))
    size = setup.model.head_size
    if setup.density is not None:
        return scattered_masks(
            str(model), setup.length, setup.page, setup.density, setup.dynamic, size, CHANNELS
        )
    masks = streaming(str(model), 1, setup.window)
    return with_dynamic_heads(masks, setup.dynamic, size, CHANNELS, setup.window - 1)


def _choice(masks: Path, options: Mapping[str, object]) -> list[str]:
    config = {"dam": {"masks": str(masks), **options}}
    return ["--attention-backend=dam", "--additional-config", json.dumps(config)]
