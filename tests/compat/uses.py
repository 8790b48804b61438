"""What our code takes of vLLM, held against a release: imports, overrides, calls, attributes."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.compat.source import Class, Source

CONFIG = ("vllm.config", "VllmConfig")
# What is taken of objects whose class our code does not tell.
BEHIND_ANY = {
    ("vllm.config", "ModelConfig"): [
        "model", "revision", "hf_config", "use_mla", "is_attention_free", "is_encoder_decoder",
        "attn_type", "get_head_size", "get_total_num_kv_heads", "enable_sleep_mode",
    ],
    ("vllm.config", "SpeculativeConfig"): ["method", "num_speculative_tokens"],
    ("vllm.config", "AttentionConfig"): ["backend", "backend_per_kind"],
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder"): ["_init_reorder_batch_threshold"],
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder"): [
        "_set_isa_to_layers", "isa", "block_size"
    ],
    ("vllm.v1.core.single_type_kv_cache_manager", "SingleTypeKVCacheManager"): [
        "_remove_blocks_in_range"
    ],
    ("vllm.model_executor.layers.attention", "Attention"): ["impl", "layer_name", "kv_cache"],
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl"): [
        "alibi_slopes", "sinks", "attn_type", "sliding_window", "scale", "logits_soft_cap",
        "num_heads", "num_kv_heads", "head_size", "kv_cache_dtype", "kv_sharing_target_layer_name",
        "vllm_flash_attn_version", "fa4_hd256", "supports_quant_query_input", "num_queries_per_kv",
    ],
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadataBuilder"): [
        "max_num_splits", "aot_schedule", "max_cudagraph_size", "device", "vllm_config",
    ],
    ("vllm.v1.attention.backend", "CommonAttentionMetadata"): [
        "seq_lens_cpu_upper_bound", "is_prefilling"
    ],
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl"): ["num_queries_per_kv"],
    ("vllm.v1.request", "Request"): ["num_tokens", "has_encoder_inputs"],
    ("vllm.v1.core.block_pool", "BlockPool"): ["get_num_free_blocks"],
    ("vllm.v1.worker.worker_base", "WorkerBase"): ["vllm_config"],
    ("vllm.v1.engine.core", "EngineCore"): ["model_executor"],
    ("vllm.v1.engine.core_client", "AsyncMPClient"): [
        "call_utility_all_async", "engine_ranks_managed"
    ],
    ("vllm.v1.engine.async_llm", "AsyncLLM"): ["engine_core", "logger_manager", "vllm_config"],
    ("vllm.v1.metrics.loggers", "StatLoggerManager"): ["engine_indexes", "stat_loggers"],
    ("vllm.v1.metrics.stats", "IterationStats"): ["finished_requests"],
    ("vllm.v1.metrics.stats", "FinishedRequestStats"): [
        "num_prompt_tokens", "num_generation_tokens"
    ],
    ("vllm.entrypoints.serve.middleware.authenticate", "AuthenticationMiddleware"): [
        "verify_token"
    ],
    ("vllm.plugins.endpoint_plugins.interface", "EndpointPlugin"): [
        "name", "required_tasks", "attach_router", "init_state"
    ],
}  # fmt: skip
# What a module sets on objects of another class.
SET_ON_OTHERS = {
    "vllm.model_executor.layers.attention.attention": [
        "_q_scale", "_k_scale", "_v_scale", "_q_scale_float", "_k_scale_float", "_v_scale_float",
    ],
}  # fmt: skip


def behind_any(source: Source) -> list[str]:
    """What a release lacks of `BEHIND_ANY` and `SET_ON_OTHERS`."""
    found = []
    for module, names in SET_ON_OTHERS.items():
        path = source.path(module)
        text = "" if path is None else path.read_text(encoding="utf-8")
        found += [f"{module} sets no {each}" for each in names if f"layer.{each} =" not in text
                  and f'register_buffer("{each}"' not in text]  # fmt: skip
    for (module, name), wanted in BEHIND_ANY.items():
        given = source.class_of(module, name)
        known = set() if given is None else given.attributes | given.methods.keys()
        found += [f"{module}.{name} has no {each}" for each in wanted if each not in known]
    return found


class Checked:
    """One file of ours, held against a release.

    Attributes:
        problems: one line for each thing that the release lacks or has otherwise.
        count: things that were looked at.
    """

    def __init__(self, file: Path, source: Source) -> None:
        self.file, self.source = file, source
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        self.problems: list[str] = []
        self.count = 0
        # Names of this file: what they are of vLLM.
        self.taken: dict[str, tuple[str, str]] = {}
        self.modules: dict[str, str] = {}
        self._imports()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef):
                self._overrides(node)
            if isinstance(node, ast.Call):
                self._call(node)
            if isinstance(node, ast.Attribute):
                self._attribute(node)

    def _expect(self, holds: bool, node: ast.AST, message: str) -> None:
        self.count += 1
        if not holds:
            self.problems.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {message}")

    def _expect_public(self, name: str, node: ast.AST) -> None:
        """Private names of vLLM are used in one file of the package."""
        ours = "dam_vllm" in self.file.parts and self.file.name != "private.py"
        if ours and name.startswith("_"):
            self._expect(False, node, f"{name} is private, belongs into engine/private.py")

    def _imports(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for each in node.names:
                    if each.name.split(".")[0] == "vllm":
                        self._expect(self.source.path(each.name) is not None, node,
                                     f"no module {each.name}")  # fmt: skip
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            module = node.module or ""
            if module.split(".")[0] != "vllm":
                continue
            for each in node.names:
                self._expect(self.source.has(module, each.name), node,
                             f"{module} has no {each.name}")  # fmt: skip
                self._expect_public(each.name, node)
                name = each.asname or each.name
                if self.source.path(f"{module}.{each.name}") is not None:
                    self.modules[name] = f"{module}.{each.name}"
                else:
                    self.taken[name] = (module, each.name)

    def _base(self, node: ast.ClassDef) -> Class | None:
        """What a class of ours inherits from vLLM."""
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.taken:
                return self.source.class_of(*self.taken[base.id])
        return None

    def _overrides(self, node: ast.ClassDef) -> None:
        base = self._base(node)
        if base is None:
            return
        ours = {each.name: each.args for each in node.body if isinstance(each, ast.FunctionDef)}
        for name, arguments in ours.items():
            if name in base.methods and name != "__init__":
                problem = _differs(arguments, base.methods[name])
                self._expect(not problem, node, f"{node.name}.{name} {problem}")
        for each in ast.walk(node):
            called = each.func if isinstance(each, ast.Call) else None
            if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "super()":
                known = called.attr in base.methods
                self._expect(known or called.attr == "__init__", each,
                             f"{node.name} calls super().{called.attr}, which is gone")  # fmt: skip
                if known:
                    problem = _refuses(base.methods[called.attr], each)
                    self._expect(not problem, each, f"super().{called.attr} {problem}")
        self._own_attributes(node, base)

    def _own_attributes(self, node: ast.ClassDef, base: Class) -> None:
        """Attributes of `self` that no class of ours sets must be vLLM's."""
        ours = {name for each in ast.walk(node) for name in _defined(each)}
        # Bases of ours that stand in other files set some.
        mixed = any(isinstance(each, ast.Name) and each.id not in self.taken for each in node.bases)
        for each in ast.walk(node):
            if (
                isinstance(each, ast.Attribute)
                and isinstance(each.value, ast.Name)
                and each.value.id in ("self", "cls")
                and each.attr not in ours
                and not each.attr.startswith("__")
                and not mixed
            ):
                self._expect(each.attr in base.attributes | base.methods.keys(), each,
                             f"{node.name} reads self.{each.attr}, which is gone")  # fmt: skip
                self._expect_public(each.attr, each)

    def _call(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Name) or node.func.id not in self.taken:
            return
        found = self.source.resolve(*self.taken[node.func.id])
        if found is not None and isinstance(found[1], ast.FunctionDef):
            problem = _refuses(found[1].args, node, bound=False)
            self._expect(not problem, node, f"{node.func.id} {problem}")

    def _attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self.modules:
            module = self.modules[node.value.id]
            self._expect(self.source.has(module, node.attr), node,
                         f"{module} has no {node.attr}")  # fmt: skip
        if isinstance(node.value, ast.Name) and node.value.id in self.taken:
            given = self.source.class_of(*self.taken[node.value.id])
            if given is not None:
                self._expect(node.attr in given.attributes | given.methods.keys()
                             or node.attr.startswith("__"), node,
                             f"{node.value.id} has no {node.attr}")  # fmt: skip
        parts = _chain(node)
        if parts[0] in ("vllm_config", "config") and "VllmConfig" in self.taken:
            self._configuration(node, parts[1:])

    def _configuration(self, node: ast.Attribute, names: list[str]) -> None:
        """Follows `config.a.b` as far as types are told."""
        given = self.source.class_of(*CONFIG)
        for name in names:
            if given is None:
                return
            known = given.attributes | given.methods.keys()
            self._expect(name in known, node, f"the configuration has no {'.'.join(names)}")
            where, kind = given.annotations.get(name, ("", ""))
            kind = kind.replace(" | None", "").split("[")[0].strip("'\"")
            given = self.source.class_of(where, kind) if where else None


def _chain(node: ast.expr) -> list[str]:
    """`a.b.c` as names; the first is empty where it is no name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *reversed(names)]


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id


def _positional(arguments: ast.arguments) -> list[str]:
    names = [each.arg for each in [*arguments.posonlyargs, *arguments.args]]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def _differs(ours: ast.arguments, theirs: ast.arguments) -> str:
    """Why our method cannot stand for theirs, or nothing."""
    mine, wanted = _positional(ours), _positional(theirs)
    known = {*mine, *(each.arg for each in ours.kwonlyargs)}
    for row, name in enumerate(wanted):
        if name in known or ours.kwarg is not None:
            continue
        if ours.vararg is None or row < len(mine):
            return f"does not take {name}"
    missing = {each.arg for each in theirs.kwonlyargs} - known
    if missing and ours.kwarg is None:
        return f"does not take {', '.join(sorted(missing))}"
    needed = mine[: len(mine) - len(ours.defaults)]
    extra = [name for name in needed if name not in wanted]
    return f"needs {', '.join(extra)}, which is not given" if extra and not theirs.vararg else ""


def _refuses(theirs: ast.arguments, call: ast.Call, bound: bool = True) -> str:
    """Why a function cannot be called so, or nothing."""
    names = _positional(theirs) if bound else [e.arg for e in [*theirs.posonlyargs, *theirs.args]]
    given = [each.arg for each in call.keywords]
    starred = None in given or any(isinstance(each, ast.Starred) for each in call.args)
    known = {*names, *(each.arg for each in theirs.kwonlyargs)}
    unknown = [name for name in given if name is not None and name not in known]
    if unknown and theirs.kwarg is None:
        return f"takes no {', '.join(unknown)}"
    if len(call.args) > len(names) and theirs.vararg is None and not starred:
        return f"takes {len(names)} positional arguments"
    needed = names[: len(names) - len(theirs.defaults)][len(call.args) :]
    missing = [name for name in needed if name not in given]
    return f"needs {', '.join(missing)}" if missing and not starred else ""
