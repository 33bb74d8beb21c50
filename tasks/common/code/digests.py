"""Digests of a module's code: one for each function, method, class and constant at its top level.

They are the same under every Python version that can parse the module: fields that later versions add to the syntax
tree are left out if they are empty.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tasks.common.code.canonical import canonicalize

Digests = dict[str, str]  # a definition (`gae`, `Policy.forward`, `RATE`) to its digest
DIGEST_LENGTH = 32  # hex digits, that is 128 bits
IGNORED_FIELDS = ("ctx", "kind", "simple", "type_comment", "type_ignores", "type_params")
IMPORTS, ORDER, REST = "(imports)", "(order)", "(rest)"
# Decorators without side effects, so that the order of the decorated functions does not matter.
PURE_DECORATORS = {
    "abstractmethod", "asynccontextmanager", "cache", "cached_property", "classmethod", "contextmanager", "dataclass",
    "inference_mode", "lru_cache", "no_grad", "property", "staticmethod", "total_ordering", "wraps",
}  # fmt: skip


@lru_cache(maxsize=512)
def digest_source(source: str, data_errors: tuple[str, ...] = ()) -> Digests:
    """Return the digests of a module's definitions, sorted by name; empty for a module without definitions.

    For `data_errors` see `canonicalize`. Raises SyntaxError if the text is not valid Python.
    """
    parts: dict[str, list[Any]] = {}
    executed: list[str] = []
    for statement in canonicalize(ast.parse(source), data_errors).body:
        for name, content in _definitions(statement):
            parts.setdefault(name, []).append(content)
        executed += _executed(statement)
    if IMPORTS in parts:
        parts[IMPORTS].sort()
    decorated = sum(name.startswith("@") for name in executed)
    if REST in executed or len(set(executed)) < len(executed) or decorated > 1:
        parts[ORDER] = [executed]
    return {name: _digest(parts[name]) for name in sorted(parts)}


def canonical_json(node: Any) -> Any:
    """Return a syntax tree as JSON values, in the same form for all versions of Python."""
    if isinstance(node, ast.Constant):
        value = node.value.hex() if isinstance(node.value, bytes) else node.value
        return ["Constant", type(node.value).__name__, value if isinstance(value, str) else repr(value)]
    if isinstance(node, ast.AST):
        fields = (pair for pair in ast.iter_fields(node) if pair[0] not in IGNORED_FIELDS)
        filled = {name: canonical_json(value) for name, value in fields if value is not None and value != []}
        return [type(node).__name__, filled]
    return [canonical_json(item) for item in node] if isinstance(node, list) else node


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def _definitions(statement: ast.stmt) -> Iterator[tuple[str, Any]]:
    """Yield (name, content) of each definition in a top-level statement."""
    if isinstance(statement, ast.Import):
        yield from ((IMPORTS, [alias.name, "", alias.asname or ""]) for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        module = "." * statement.level + (statement.module or "")
        yield from ((IMPORTS, [module, alias.name, alias.asname or ""]) for alias in statement.names)
    elif isinstance(statement, ast.ClassDef):
        methods = [item for item in statement.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        yield from ((f"{statement.name}.{method.name}", canonical_json(method)) for method in methods)
        # The order of decorated methods counts: pydantic runs validators in the order of their definition.
        decorated = [method.name for method in methods if method.decorator_list]
        statement.body = [item for item in statement.body if item not in methods]
        yield statement.name, [canonical_json(statement), decorated]
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name, canonical_json(statement)
    else:
        yield ", ".join(_constants(statement)) or REST, canonical_json(statement)


def _constants(statement: ast.stmt) -> list[str]:
    """Return the names that an assignment binds; [] for other statements and other targets."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(names) == len(parts) else []


def _executed(statement: ast.stmt) -> Sequence[str]:
    """Return the names in a statement whose execution may have side effects: assignments and decorated definitions."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [] if all(_is_pure(item) for item in statement.decorator_list) else [f"@{statement.name}"]
    if isinstance(statement, ast.Import | ast.ImportFrom) or _is_start(statement):
        return []
    return _constants(statement) or [REST]


def _is_pure(decorator: ast.expr) -> bool:
    found = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (found.attr if isinstance(found, ast.Attribute) else getattr(found, "id", "")) in PURE_DECORATORS


def _is_start(statement: ast.stmt) -> bool:
    """Return whether a statement is `if __name__ == "__main__"`, whose position does not matter."""
    return isinstance(statement, ast.If) and "__name__" in {
        node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)
    }
