"""What the endpoint takes of vLLM in an API server's process."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers

pytestmark = pytest.mark.engine


def test_the_plugin_is_what_vllm_wants():
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from dam_vllm.endpoint.plugin import DamEndpoint

    assert isinstance(DamEndpoint(), EndpointPlugin)


def test_engine_and_workers_can_be_asked():
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from dam_vllm.engine.counters import METHOD, engine_counts, worker_counts
    from dam_vllm.plugin import register

    register()
    register()
    assert getattr(EngineCore, METHOD) is engine_counts
    assert getattr(WorkerBase, METHOD) is worker_counts


def test_an_engine_without_the_backend_counts_nothing():
    from dam_vllm.engine.counters import engine_counts, worker_counts

    stock = SimpleNamespace(impl=SimpleNamespace())
    compilation = SimpleNamespace(static_forward_context={"layer": stock})
    config = SimpleNamespace(compilation_config=compilation)
    worker = SimpleNamespace(vllm_config=config)
    executor = SimpleNamespace(collective_rpc=lambda method: [worker_counts(worker)])
    assert engine_counts(SimpleNamespace(model_executor=executor))["workers"] == []


@pytest.mark.parametrize(("option", "variable"), [(["one", "two"], ""), (None, "two")])
def test_keys_are_those_of_the_server(monkeypatch, option, variable):
    from dam_vllm.engine.frontend import key_check

    monkeypatch.setenv("VLLM_API_KEY", variable)
    has_key = key_check(Namespace(api_key=option))
    for given, wanted in (
        ("Bearer two", True),
        ("Bearer tw", False),
        ("two", False),
        (None, False),
    ):
        assert has_key(Headers({} if given is None else {"Authorization": given})) == wanted


def test_without_keys_none_is_asked_for(monkeypatch):
    from dam_vllm.engine.frontend import key_check

    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_check(Namespace(api_key=None)) is None


def test_requests_are_sparse_where_a_query_stands_far_enough():
    from prometheus_client import REGISTRY

    from dam_vllm.engine.frontend import RequestCounter

    model = SimpleNamespace(served_model_name="tiny")
    counter = RequestCounter(SimpleNamespace(model_config=model), [0, 1], dense_until=128)
    ended = [(100, 29), (100, 30), (129, 1), (1, 1)]  # of the second the last query stands at 128
    requests = [
        SimpleNamespace(num_prompt_tokens=prompt, num_generation_tokens=new)
        for prompt, new in ended
    ]
    counter.record(None, SimpleNamespace(finished_requests=requests), engine_idx=1)
    counter.record(None, None, engine_idx=0)

    def value(engine, mode):
        labels = {"model_name": "tiny", "engine": engine, "mode": mode}
        return REGISTRY.get_sample_value("vllm:dam_requests_total", labels)

    assert [value("1", mode) for mode in ("dense", "sparse")] == [2, 2]
    assert [value("0", mode) for mode in ("dense", "sparse")] == [0, 0]
