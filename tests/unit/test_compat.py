"""The check of vLLM's releases finds what a release lacks."""

import pytest

from tests.compat.source import Source
from tests.compat.uses import Checked

VLLM = {
    "vllm/__init__.py": 'MODULE_ATTRS = {"LLM": ".entrypoints:LLM"}',
    "vllm/config/__init__.py": "from .all import *",
    "vllm/config/all.py": (
        "class Cache:\n    size: int = 0\nclass VllmConfig:\n    cache_config: Cache = None"
    ),
    "vllm/impl.py": (
        "class Above:\n"
        "    def __init__(self, a): self.kept = a\n"
        "    def forward(self, layer, query, *, scale=1): ...\n"
        "if True:\n"
        "    class Impl(Above):\n"
        "        _hidden = 1\n"
        "        def build(self, step, fast=False): ...\n"
        "def make(a, b=2): ..."
    ),
}
HEAD = "from vllm import LLM\nfrom vllm.config import VllmConfig\nfrom vllm import impl\n"
HEAD += "from vllm.impl import Impl, make\nclass Ours(Impl):\n"


@pytest.fixture
def check(tmp_path):
    for name, text in VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(body, head=HEAD):
        folder = tmp_path / "dam_vllm"
        folder.mkdir(exist_ok=True)
        (folder / "file.py").write_text(head + body)
        return [line.split(": ", 1)[1]
                for line in Checked(folder / "file.py", Source(tmp_path)).problems]  # fmt: skip

    return run


def test_what_is_there_passes(check):
    body = "    def forward(self, layer, query, more=1, *, scale=2): return self.kept\n"
    body += "    def build(self, *args, **kwargs): return super().build(1, fast=True)\n"
    body += (
        "def use(config: VllmConfig): return config.cache_config.size, impl.make(1), make(1, b=3)"
    )
    assert check(body) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("    def forward(self, layer): ...", "Ours.forward does not take query"),
        ("    def forward(self, layer, query): ...", "Ours.forward does not take scale"),
        ("    def build(self, step, fast, more): ...", "Ours.build needs more, which is not given"),
        ("    def x(self): return self.gone", "Ours reads self.gone, which is gone"),
        ("    def x(self): return self._hidden",
         "_hidden is private, belongs into engine/private.py"),
        ("    def x(self): super().gone()", "Ours calls super().gone, which is gone"),
        ("    def build(self, *a): super().build(1, slow=1)", "super().build takes no slow"),
        ("    x = make()", "make needs a"),
        ("    x = impl.gone", "vllm.impl has no gone"),
        ("    x = Impl.gone", "Impl has no gone"),
        ("    def x(self, config): config.cache_config.gone",
         "the configuration has no cache_config.gone"),
    ],
)  # fmt: skip
def test_what_is_gone_is_named(check, body, problem):
    assert problem in check(body)


def test_missing_imports_are_named(check):
    head = "import vllm.gone\nfrom vllm.impl import gone\nfrom vllm.impl import make\n"
    assert check("", head) == ["no module vllm.gone", "vllm.impl has no gone"]
