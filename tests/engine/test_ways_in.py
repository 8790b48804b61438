"""Each way to ask vLLM for the backend and its options, up to the engine's configuration."""

from dataclasses import replace

import pytest

from dam_vllm.demo import model_dir
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.options import MASKS_IN_MODEL

pytestmark = pytest.mark.engine

DEMO = str(model_dir())
OPTIONS = {"dam": {"dense_below": 77}}


def served(arguments):
    """The engine's configuration of a `vllm serve` command line."""
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    parsed = parser.parse_args(["serve", *arguments])
    parsed.model = parsed.model_tag or parsed.model
    return AsyncEngineArgs.from_cli_args(parsed).create_engine_config()


def in_python(**arguments):
    """The engine's configuration of `LLM(...)` in a program."""
    from vllm import EngineArgs

    return EngineArgs(DEMO, additional_config=OPTIONS, **arguments).create_engine_config()


def yaml_file(folder):
    file = folder / "serve.yaml"
    file.write_text(
        f"model: {DEMO}\nattention-backend: dam\nadditional-config:\n  dam:\n    dense_below: 77\n"
    )
    return file


def attention_config(backend):
    """What a program makes itself, once vLLM knows its plugins."""
    from vllm.config import AttentionConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return AttentionConfig(backend=backend)


WAYS = {
    "lower case": lambda folder: served(
        [DEMO, "--attention-backend", "dam", "--additional-config", '{"dam": {"dense_below": 77}}']
    ),
    "upper case": lambda folder: served(
        [DEMO, "--attention-backend=DAM", "--additional-config.dam.dense_below=77"]
    ),
    "JSON": lambda folder: served(
        [DEMO, "--attention-config", '{"backend": "dam"}', "--additional-config.dam.dense_below=77"]
    ),
    "YAML": lambda folder: served(["--config", str(yaml_file(folder))]),
    "argument": lambda folder: in_python(attention_backend="dam"),
    "object": lambda folder: in_python(attention_config=attention_config("dam")),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_choice_and_its_options_arrive(way, tmp_path):
    config = WAYS[way](tmp_path)
    assert config.attention_config.backend.name == "DAM"
    assert config.additional_config == OPTIONS
    assert config.model_config.model == DEMO


@pytest.mark.parametrize(
    ("given", "page"), [({}, 32), ({"block_size": 64}, 64), ({"attention_backend": None}, 128)]
)
def test_pages_are_as_the_masks_were_fitted(given, page):
    """The demo model's masks were fitted for pages of 32, vLLM's own have 128."""
    assert in_python(**{"attention_backend": "dam"} | given).cache_config.block_size == page


@pytest.mark.parametrize("fitted", [None, 48])
def test_pages_of_a_fit_that_cannot_be_served_are_vllms(tmp_path, fitted):
    masks = load_mask_set(model_dir() / MASKS_IN_MODEL)
    fit = {} if fitted is None else {"fit": masks.header.parameters["fit"] | {"page": fitted}}
    header = masks.header.model_copy(update={"parameters": fit})
    save_mask_set(replace(masks, header=header, frontier=None), tmp_path / "masks")
    options = {"dam": {"masks": str(tmp_path / "masks")}}
    from vllm import EngineArgs

    arguments = EngineArgs(DEMO, attention_backend="dam", additional_config=options)
    assert arguments.create_engine_config().cache_config.block_size == 128
