"""The server that answers for a subject: stock vLLM, or the `dam` backend with its masks."""

import json
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dam_vllm.evaluation.client import Client, HttpClient
from dam_vllm.evaluation.settings import Settings, Subject
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.server import Server

# Groups of plugins that vLLM loads where VLLM_PLUGINS is not set (vllm/plugins/__init__.py).
LOADED = ("general", "platform", "io_processor", "stat_logger")
START_SECONDS = 1800.0
AUTO = "auto"
SPARE_PAGES = 64

Start = Callable[[Subject], AbstractContextManager[Client]]


def starter(settings: Settings, chat: bool) -> Start:
    """Makes the function that starts a subject's server and gives a client of it.

    Args:
        settings: of the evaluation.
        chat: whether questions go through the chat endpoint.

    Returns:
        The function; the server stops when its context ends.
    """
    common = common_arguments(settings)

    @contextmanager
    def start(subject: Subject) -> Iterator[Client]:
        with TemporaryDirectory(prefix="dam-eval-") as folder:
            file = subject.file
            if file is None and subject.masks is not None:
                file = Path(folder) / "masks.safetensors"
                save_mask_set(subject.masks, file)
            own = [] if file is None else masks_arguments(file, settings.dense_below)
            environment = {} if file is None else {"VLLM_PLUGINS": plugins()}
            arguments = [*common, *own, *settings.serve_args]
            with Server(settings.model, arguments, environment, START_SECONDS) as server:
                yield HttpClient(server.url, settings.model, chat)

    return start


def common_arguments(settings: Settings) -> list[str]:
    """Arguments that all servers of an evaluation share."""
    from transformers import AutoConfig

    result = [
        f"--block-size={settings.page}",
        f"--max-model-len={settings.max_length}",
        "--no-enable-prefix-caching",
        # Prefill gains little from compilation, which every server would do anew.
        "--enforce-eager",
    ]
    size = token_bytes(AutoConfig.from_pretrained(settings.model), _dtype(settings.serve_args))
    if size is not None:
        pages = ceil_div(settings.max_length, settings.page) + SPARE_PAGES
        result.append(f"--kv-cache-memory-bytes={size * settings.page * pages}")
    return result


def masks_arguments(masks: Path, dense_below: int) -> list[str]:
    """Arguments that make a server read a mask file."""
    options = {"dam": {"masks": str(masks.resolve()), "dense_below": dense_below}}
    return [
        "--attention-backend=dam",
        "--additional-config",
        json.dumps(options),
    ]


def plugins() -> str:
    """Names of vLLM's plugins that are loaded anyway, and ours, whose endpoint tells pages."""
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        return ",".join(sorted({*given.split(","), "dam"}))
    loaded = (each for group in LOADED for each in entry_points(group=f"vllm.{group}_plugins"))
    return ",".join(sorted({*(each.name for each in loaded), "dam"}))


def _dtype(serve_args: Sequence[str]) -> str:
    """What `--dtype` says, in either spelling."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", nargs="?", default=AUTO, const=AUTO)
    return str(parser.parse_known_args(serve_args)[0].dtype)


def token_bytes(config: Any, dtype: str = AUTO) -> int | None:
    """Bytes that a token takes in the KV cache, as if all layers kept keys and values.

    Args:
        config: a transformers configuration.
        dtype: vLLM's `--dtype`.

    Returns:
        Bytes, or None where the configuration does not tell them.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    layers, hidden = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    if not (heads and layers and hidden):
        return None
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    stored = str(getattr(text, "dtype", None)).removeprefix("torch.")
    width = 4 if (stored if dtype == AUTO else dtype) in ("float32", "float") else 2
    return int(2 * layers * kv_heads * head_size * width)
