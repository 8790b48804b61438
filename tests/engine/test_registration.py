"""The choice reaches every process, and without it nothing changes."""

import functools
import multiprocessing
import pickle
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def _registered():
    from dam_vllm.plugin import register

    register()
    register()


def selected(backend):
    """Path of the backend that the CPU platform gives for a choice."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 32)
    return current_platform.get_attn_backend_cls(backend, config)


def test_member_is_the_same_after_pickling():
    from dam_vllm.engine.registration import member

    assert pickle.loads(pickle.dumps(member())) is member()
    assert member().name == "DAM"


def child(payload, queue):
    queue.put(pickle.loads(payload).get_path())


def test_member_reaches_a_spawned_process():
    """A spawned process unpickles the configuration before it loads plugins."""
    from dam_vllm.engine.registration import BACKENDS, member

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(pickle.dumps(member()), queue))
    process.start()
    assert queue.get(timeout=120) == BACKENDS["cpu"]
    process.join()


def test_choice_is_honoured_and_others_are_left_alone():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from dam_vllm.engine.registration import BACKENDS, member

    assert selected(member()) == BACKENDS["cpu"]
    stock = AttentionBackendEnum.CPU_ATTN.get_path()
    assert selected(None) == selected(AttentionBackendEnum.CPU_ATTN) == stock


def test_another_plugins_wrapper_does_not_keep_ours_away():
    """Below or above ours; ours is there once."""
    from dam_vllm.engine.registration import BACKENDS, _honour_choice, member

    class Platform:
        @classmethod
        def get_attn_backend_cls(cls, selected, config, num_heads=None):
            return "stock"

    def wrap():
        stock = Platform.get_attn_backend_cls.__func__
        other = functools.wraps(stock)(lambda *given: stock(*given))
        Platform.get_attn_backend_cls = classmethod(other)

    wrap()
    _honour_choice(Platform)
    config = SimpleNamespace(use_mla=False, use_sparse=False)
    assert Platform.get_attn_backend_cls(member(), config) == BACKENDS["cpu"]
    assert Platform.get_attn_backend_cls(None, config) == "stock"
    for change in (wrap, lambda: None):
        change()
        before = Platform.get_attn_backend_cls.__func__
        _honour_choice(Platform)
        assert Platform.get_attn_backend_cls.__func__ is before


def test_model_native_sparse_attention_is_refused():
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from dam_vllm.engine.registration import member

    config = AttentionSelectorConfig(64, torch.bfloat16, "auto", 32, use_sparse=True)
    with pytest.raises(ValueError, match="sparse attention of its own, which DAM does not serve"):
        current_platform.get_attn_backend_cls(member(), config)


@pytest.mark.parametrize(
    ("version", "warned"), [("0.32.1", False), ("0.33.0+cu130", False), ("0.34.0", True)]
)
def test_an_untested_release_is_named(monkeypatch, version, warned):
    import vllm

    from dam_vllm.engine import private

    monkeypatch.setattr(vllm, "__version__", version)
    messages = []
    monkeypatch.setattr(private.logger, "warning", lambda *told: messages.append(told))
    private.warn_untested()
    assert [told[-1] for told in messages] == [version] * warned
