"""What the endpoint takes of vLLM in the process of an API server."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import vllm
from prometheus_client import CollectorRegistry, Counter
from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import IterationStats

from dam_vllm.engine.counters import METHOD
from dam_vllm.engine.serving import Serving, serving_of

VERSION = vllm.__version__


def served(client: AsyncLLM) -> Serving:
    """Options and masks, as the workers of an API server's engines read them."""
    return serving_of(client.vllm_config)


def model_name(client: AsyncLLM) -> str:
    """The label of vLLM's own metrics."""
    return str(client.vllm_config.model_config.served_model_name)


async def engine_reports(client: AsyncLLM) -> dict[int, dict[str, Any]]:
    """Asks all engines of an API server what they counted.

    Args:
        client: of the API server.

    Returns:
        `engine_counts` by the engine's number.
    """
    core: AsyncMPClient = client.engine_core
    reports = await core.call_utility_all_async(METHOD)
    return dict(zip(core.engine_ranks_managed, reports, strict=True))


def registry() -> CollectorRegistry:
    """What vLLM's /metrics tells: of this process, or of all API servers where there are more."""
    return get_prometheus_registry()


def key_check(args: Namespace) -> Callable[[Any], bool] | None:
    """What tells by a request's headers whether it has a key; None where none is asked for.

    vLLM's own middleware, which guards some paths alone, is asked; its keys are kept as it keeps
    them.
    """
    # As vllm/entrypoints/serve/middleware/register.py takes them.
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not keys:
        return None

    async def nothing(scope: Any, receive: Any, send: Any) -> None:
        pass

    return AuthenticationMiddleware(nothing, keys).verify_token


class RequestCounter(AggregateStatLoggerBase):
    """Counts requests that ended, by whether any of their queries attended sparsely."""

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: list[int], dense_until: int
    ) -> None:
        """Counts from 0 on.

        Args:
            vllm_config: vLLM's configuration.
            engine_indexes: numbers of the engines.
            dense_until: positions below it read everything, in tokens.
        """
        self.dense_until = dense_until
        labels = ("model_name", "engine", "mode")
        counter = Counter("vllm:dam_requests", "Requests that ended, by their attention.", labels)
        name = vllm_config.model_config.served_model_name
        self.counters = {
            (index, mode): counter.labels(name, str(index), mode)
            for index in engine_indexes
            for mode in ("dense", "sparse")
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        for request in iteration_stats.finished_requests if iteration_stats else ():
            # The last token of an answer is no query.
            queries = request.num_prompt_tokens + request.num_generation_tokens - 1
            mode = "sparse" if queries > self.dense_until else "dense"
            self.counters[engine_idx, mode].inc()

    def log_engine_initialized(self) -> None:
        pass


def count_requests(client: AsyncLLM, dense_until: int) -> None:
    """Lets vLLM tell its finished requests; nothing where it keeps no statistics."""
    if client.logger_manager is not None:
        engines = client.logger_manager.engine_indexes
        counter = RequestCounter(client.vllm_config, engines, dense_until)
        client.logger_manager.stat_loggers.append(counter)
