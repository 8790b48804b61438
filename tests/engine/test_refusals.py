"""What cannot be served is refused by the first process, before vLLM starts any other."""

import functools
from importlib import import_module
from operator import attrgetter

import pytest
from transformers import LlamaConfig

from dam_vllm.demo import model_dir
from dam_vllm.engine import private
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import MaskFileError, save_mask_set
from dam_vllm.options import OptionError

pytestmark = pytest.mark.engine

DEMO = str(model_dir())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with mask files."""
    folder = tmp_path_factory.mktemp("refused")
    other = LlamaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    other.save_pretrained(folder / "other")
    save_mask_set(streaming(DEMO, 4, 64), folder / "good")
    save_mask_set(streaming(str(folder / "other"), 4, 64), folder / "foreign")
    (folder / "damaged").write_bytes((folder / "good").read_bytes()[:-9])
    return folder


def configure(files, options, **arguments):
    """What `LLM(...)` and `vllm serve` do before they start other processes."""
    from vllm import EngineArgs

    masks = {key: str(files / value) if key == "masks" else value for key, value in options.items()}
    return EngineArgs(
        DEMO, attention_backend="dam", max_model_len=512, additional_config={"dam": masks},
        **arguments,
    ).create_engine_config()  # fmt: skip


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"masks": "none"}, {}, "dam.masks is '.*none': must be a mask file"),
        ({"masks": "damaged"}, {}, "mask file .*damaged is damaged"),
        ({"masks": "foreign"}, {}, "mask file .*foreign was made for another model"),
        ({"mask": "good"}, {}, "unknown option 'dam.mask'; allowed are masks"),
        ({"masks": "good", "kernel": "flash"}, {}, "dam.kernel is 'flash': on CPU"),
        ({"masks": "good"}, {"block_size": 16}, "--block-size is 16"),
        ({"masks": "good"}, {"kv_cache_dtype": "int8_per_token_head"},
         "--kv-cache-dtype is int8_per_token_head"),
    ],
)  # fmt: skip
def test_refused_before_a_worker_starts(files, options, arguments, message):
    with pytest.raises((OptionError, MaskFileError), match=message):
        configure(files, options, **arguments)


def test_what_fits_is_served(files):
    config = configure(files, {"masks": "good"})
    assert config.attention_config.backend.name == "DAM"


def test_masks_are_read_once(files, monkeypatch):
    """And again once the file was replaced."""
    from dam_vllm.engine import checks, serving

    read, load = [], serving.load_mask_set
    monkeypatch.setattr(serving, "load_mask_set", lambda file: read.append(file) or load(file))
    for window in (64, 96):
        save_mask_set(streaming(DEMO, 4, window), files / "once")
        configure(files, {"masks": "once"})
        assert read == [files / "once"]
        options = checks.parse_options({"dam": {"masks": str(files / "once")}})
        assert serving.read_masks(options, DEMO, None, None).masks.reach == window
        read.clear()
        checks._load.cache_clear()


def test_another_plugins_wrapper_does_not_keep_ours_away(files, monkeypatch):
    from vllm import EngineArgs

    from dam_vllm.engine.refusals import refuse_early
    from dam_vllm.engine.registration import member
    from dam_vllm.plugin import register

    register()
    stock = EngineArgs.create_engine_config.__wrapped__
    other = functools.wraps(stock)(lambda *args, **kwargs: stock(*args, **kwargs))
    monkeypatch.setattr(EngineArgs, "create_engine_config", other)
    for _ in range(2):
        refuse_early(member())
        assert EngineArgs.create_engine_config.__wrapped__ is other
    with pytest.raises(OptionError, match="unknown option"):
        configure(files, {"mask": "good"})


def test_other_backends_are_not_looked_at(files):
    from vllm import EngineArgs

    EngineArgs(DEMO, additional_config={"dam": {"mask": 1}}).create_engine_config()


def test_a_backend_of_single_layer_kinds_is_looked_at(files):
    from vllm import EngineArgs
    from vllm.config import AttentionConfig

    attention = AttentionConfig(backend_per_kind={"full_attention": "DAM"})
    asked = EngineArgs(
        DEMO, attention_config=attention, additional_config={"dam": {"mask": str(files / "good")}}
    )
    with pytest.raises(OptionError, match="unknown option"):
        asked.create_engine_config()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module, names in (private.NAMES | private.CPU_NAMES).items()
        for name in names
    ],
)
def test_a_release_without_a_private_name_is_refused(monkeypatch, files, module, name):
    *owner, last = name.split(".")
    found = import_module(module)
    monkeypatch.delattr(attrgetter(*owner)(found) if owner else found, last)
    with pytest.raises(OptionError, match=rf"has no {module}\.{name}; install vLLM 0"):
        configure(files, {"masks": "good"})
