"""Our command line for vLLM's own client, taken by its own parser."""

import argparse

import pytest

from dam_vllm.bench.client import Load, command
from dam_vllm.server import Server

pytestmark = pytest.mark.engine


def test_the_client_knows_every_option(tmp_path):
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    server = Server(tmp_path / "model")
    load = Load(tokens=1234, new=9, requests=6, concurrency=3, warm_ups=2)
    found = parser.parse_args(command(server, load, 7, tmp_path / "a.json")[3:])
    assert (found.base_url, found.model) == (f"http://127.0.0.1:{server.port}", server.model)
    assert (found.random_input_len, found.random_output_len, found.num_prompts) == (1234, 9, 6)
    assert (found.max_concurrency, found.num_warmups, found.seed) == (3, 2, 7)
    assert (found.result_dir, found.result_filename) == (str(tmp_path), "a.json")
    assert found.ignore_eos
    assert found.save_detailed
