"""What vLLM's entry point `vllm.endpoint_plugins` makes, where VLLM_PLUGINS names `dam`."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from dam_vllm.endpoint import answers
from dam_vllm.endpoint.counts import Live
from dam_vllm.endpoint.metrics import DamCollector
from dam_vllm.endpoint.routes import Open, routers

# A scrape must not wait for a long step; then it tells what was counted before.
PATIENCE = 1.0


class DamEndpoint:
    """vLLM's `EndpointPlugin`: adds routes to an API server, then learns of its engines.

    Attributes:
        name: by which VLLM_PLUGINS names it.
        required_tasks: None, whatever the server's model is for.
    """

    name = "dam"
    required_tasks = None

    def __init__(self) -> None:
        self.collector = DamCollector()

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; takes the place of vLLM's /metrics, to tell what it tells and more."""
        from dam_vllm.engine.frontend import key_check, registry

        for router in routers(key_check(app.state.args)):
            app.include_router(router)
        told: CollectorRegistry = registry()
        told.register(self.collector)

        async def metrics(request: Request) -> Response:
            dam = getattr(request.app.state, "dam", None)
            if dam is not None:
                self.collector.snapshot = await dam.live.counts(PATIENCE)
            text = await run_in_threadpool(generate_latest, told)
            return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

        app.get("/metrics", include_in_schema=False)(metrics)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Opens the routes, if the engines serve with the backend."""
        from dam_vllm.engine import frontend

        if engine_client is None:
            return
        reports = await frontend.engine_reports(engine_client)
        workers = [worker for each in reports.values() for worker in each["workers"]]
        if not workers:
            return
        serving, told = frontend.served(engine_client), workers[0]
        self.collector.model_name = frontend.model_name(engine_client)
        frontend.count_requests(engine_client, told["dense_until"])
        state.dam = Open(
            served=answers.served(
                serving.masks,
                serving.file,
                serving.options,
                told["page"],
                told["dense_until"],
                {"vllm": frontend.VERSION},
            ),
            masks=serving.masks,
            live=Live(lambda: frontend.engine_reports(engine_client), reports),
        )
