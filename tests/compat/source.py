"""A release of vLLM read from its files, without importing it."""

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path

# Modules that give names on first use, and the dictionary that holds them.
LAZY = {"vllm": "MODULE_ATTRS", "vllm.envs": "environment_variables"}


@dataclass
class Class:
    """What a class and its bases define.

    Attributes:
        attributes: names set in the body or on `self`.
        annotations: types of attributes, as written, and the module that wrote them.
        methods: their parameters.
        dataclass: whether its fields are its parameters.
    """

    attributes: set[str] = field(default_factory=set)
    annotations: dict[str, tuple[str, str]] = field(default_factory=dict)
    methods: dict[str, ast.arguments] = field(default_factory=dict)
    dataclass: bool = False


class Source:
    """vLLM's files under a folder that holds `vllm/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._home: dict[int, str] = {}

    def path(self, module: str) -> Path | None:
        """The file of a module."""
        base = self.folder / module.replace(".", "/")
        return next((each for each in (base.with_suffix(".py"), base / "__init__.py")
                     if each.is_file()), None)  # fmt: skip

    @functools.cache  # noqa: B019 (lives as long as the run)
    def names(self, module: str) -> dict[str, ast.stmt]:
        """Names that a module binds, by the statement that does."""
        path = self.path(module)
        if path is None:
            return {}
        found: dict[str, ast.stmt] = {}
        waiting = list(ast.parse(path.read_text(encoding="utf-8")).body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If | ast.Try):
                waiting += [*node.body, *node.orelse]
                for handler in getattr(node, "handlers", ()):
                    waiting += handler.body
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                target = _absolute(module, node, path)
                found |= self.names(target) if target.startswith("vllm") else {}
            for name in _bound(node):
                # A definition tells more than an import or another branch's None.
                if name not in found or isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found[name] = node
                    self._home.setdefault(id(node), module)
            if module in LAZY and LAZY[module] in _bound(node):
                value = getattr(node, "value", None)
                if isinstance(value, ast.Dict):
                    found |= {
                        key.value: node for key in value.keys if isinstance(key, ast.Constant)
                    }
        return found

    def resolve(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The module and statement that define a name, imports followed."""
        for _ in range(9):
            node = self.names(module).get(name)
            if not isinstance(node, ast.ImportFrom):
                if node is None:
                    return None
                # What came by `import *` stands in the module that it came from.
                return self._home.get(id(node), module), node
            target = _absolute(module, node, self.path(module))
            original = next(each.name for each in node.names if (each.asname or each.name) == name)
            if not target.startswith("vllm"):
                return module, node
            module, name = target, original
        return None

    def has(self, module: str, name: str) -> bool:
        """Whether `from module import name` works."""
        return name in self.names(module) or self.path(f"{module}.{name}") is not None

    @functools.cache  # noqa: B019
    def class_of(self, module: str, name: str) -> Class | None:
        """A class, with what its bases in vLLM give it; None for what is no class."""
        found = self.resolve(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        where, node = found
        result = Class()
        for base in reversed(node.bases):
            inner = base.value if isinstance(base, ast.Subscript) else base
            above = self.class_of(where, inner.id) if isinstance(inner, ast.Name) else None
            if above is not None:
                result.attributes |= above.attributes
                result.annotations |= above.annotations
                result.methods |= above.methods
                result.dataclass |= above.dataclass
        result.dataclass |= any("dataclass" in ast.unparse(each) or "config" in ast.unparse(each)
                                for each in node.decorator_list)  # fmt: skip
        for each in node.body:
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                result.methods[each.name] = each.args
                result.attributes |= _set_on_self(each)
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                result.annotations[each.target.id] = (where, ast.unparse(each.annotation))
            result.attributes |= set(_bound(each))
        return result


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [(each.asname or each.name).split(".")[0] for each in node.names]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    flat = [each for target in targets for each in getattr(target, "elts", [target])]
    return [each.id for each in flat if isinstance(each, ast.Name)]


def _set_on_self(function: ast.AST) -> set[str]:
    """Attributes that a method sets."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _absolute(module: str, node: ast.ImportFrom, path: Path | None) -> str:
    if not node.level:
        return node.module or ""
    package = path is not None and path.name == "__init__.py"
    parts = module.split(".")[: len(module.split(".")) - node.level + package]
    return ".".join([*parts, *filter(None, [node.module])])
