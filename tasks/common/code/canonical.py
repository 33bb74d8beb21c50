"""Reduce a module's syntax tree to the parts that can change a result.

Removed are comments, docstrings, annotations, imports that only these need, messages (the texts of errors, warnings,
logs and progress bars), and the descriptions and bounds of settings, which reject values but do not change them. The
types of settings stay, because they decide how a value is parsed (`1` as `1.0`, a mapping as one of two classes).
"""

import ast
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tasks.common.code import messages

Function = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)

UNTYPED_FIELD_CLASSES = (
    "dataclass",
    "NamedTuple",
    "Protocol",
    "TypedDict",
)  # the types of their fields change no value
VALIDATORS = ("field_validator", "model_validator")
FIELD_KINDS = ("ClassVar", "InitVar")  # annotations that change how a dataclass treats a field
FIELD_CHECKS = (  # keywords of pydantic's Field that describe or reject a value
    "description", "title", "examples", "deprecated", "gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length",
    "pattern", "allow_inf_nan",
)  # fmt: skip


def canonicalize(tree: ast.Module, data_errors: Sequence[str] = ()) -> ast.Module:
    """Return a module's tree without the parts that cannot change a result; the tree is changed in place.

    Messages of the error classes `data_errors` stay, because a stage writes them into its outputs.
    """
    named = set(_names(tree))
    kept: ast.Module = _Canonicalizer(data_errors).visit(tree)
    used = {node.id for node in ast.walk(kept) if isinstance(node, ast.Name)}
    return _WithoutImports(named - used).visit(kept)  # type: ignore[no-any-return]


def is_type_checking(test: ast.expr) -> bool:
    """Return whether a condition is `TYPE_CHECKING`, so that its branch is never executed."""
    return _last_name(test) == "TYPE_CHECKING"


class _Canonicalizer(ast.NodeTransformer):
    def __init__(self, data_errors: Sequence[str]) -> None:
        self.data_errors = data_errors

    def generic_visit(self, node: Node) -> Node:
        super().generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: Function) -> Function:
        node.returns = None
        outside, checks = self.data_errors, any(_last_name(item) in VALIDATORS for item in node.decorator_list)
        self.data_errors = () if checks else outside  # a validator's message is not written to an output
        node = self.generic_visit(node)
        self.data_errors = outside
        _drop_unread_texts(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        heads = {_last_name(item) for item in (*node.decorator_list, *node.bases)}
        plain = not heads.isdisjoint(UNTYPED_FIELD_CLASSES)
        body: list[ast.stmt] = []
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (plain or node.bases):
                body.append(self._plain_field(item) if plain else self.generic_visit(item))
            else:  # annotations in a class without bases have no effect
                body += _listed(self.visit(item))
        node.body = []
        node = self.generic_visit(node)
        node.body = body
        return node

    def _plain_field(self, node: ast.AnnAssign) -> ast.AnnAssign:
        """Reduce a dataclass field to its name, its default and its kind (field, ClassVar or InitVar)."""
        kinds = [name for name in map(_last_name, ast.walk(node.annotation)) if name in FIELD_KINDS]
        node.annotation = ast.Constant(kinds[0] if kinds else "field")
        node.value = self.visit(node.value) if node.value else None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return ast.Assign([self.visit(node.target)], self.visit(node.value))

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.stmt] | None:
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call) and messages.is_message(node.value):
            call = node.value
            done = messages.side_effects([*call.args, *(keyword.value for keyword in call.keywords)])
            return [ast.Expr(self.visit(effect)) for effect in done]
        return self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
        if is_type_checking(node.test):
            return [item for branch in node.orelse for item in _listed(self.visit(branch))]
        node = self.generic_visit(node)
        empty = not node.body and not node.orelse and not any(messages.side_effects([node.test]))
        return None if empty else node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        node.cause = None
        for call in _made(node.exc):
            self._drop_text(call)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = messages.dotted(node.func).removeprefix("typing.").removeprefix("pydantic.")
        if name == "cast" and len(node.args) == 2:
            return self.visit(node.args[1])  # type: ignore[no-any-return]
        if messages.is_error(node):
            self._drop_text(node)
        if messages.is_progress_bar(node):
            node.keywords = [item for item in node.keywords if item.arg not in messages.PROGRESS_BAR_TEXTS]
        if name == "Field":
            node.keywords = [item for item in node.keywords if item.arg not in FIELD_CHECKS]
        return self.generic_visit(node)

    def _drop_text(self, call: ast.Call) -> None:
        if _last_name(call.func) not in self.data_errors:
            call.args = [value for value in call.args if not messages.is_text(value)]

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Join adjacent constants: Python versions split an f-string over several lines at different points."""
        node = self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:
            if isinstance(part, ast.Constant) and parts and isinstance(parts[-1], ast.Constant):
                parts[-1] = ast.Constant(f"{parts[-1].value!s}{part.value!s}")
            elif not (isinstance(part, ast.Constant) and part.value == ""):
                parts.append(part)
        node.values = parts
        return node


class _WithoutImports(ast.NodeTransformer):
    """Drops the imports of names that were used only in annotations and messages."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        node.names = [alias for alias in node.names if _bound(alias) not in self.names]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        node.names = [alias for alias in node.names if _bound(alias) not in self.names]
        return node if node.names and node.module != "__future__" else None


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a tree uses, including those in quoted annotations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        annotation = node.returns if isinstance(node, Function) else getattr(node, "annotation", None)
        for quoted in ast.walk(annotation) if annotation else ():
            if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
                yield from re.findall(r"[^\W\d]\w*", quoted.value)


def _drop_unread_texts(function: Function) -> None:
    """Drop assignments of texts to local names that only a removed message read."""
    while any(map(_assigns_text, ast.walk(function))):
        nodes = list(_within(function))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        kept = {node.id for node in names if not isinstance(node.ctx, ast.Store)}
        kept |= {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
        unread = {id(node) for node in nodes if _assigns_text(node) and kept.isdisjoint(_targets(node))}
        if not unread:
            return
        _remove(function, unread)


def _assigns_text(node: ast.AST) -> bool:
    """Return whether a statement assigns a text without side effects to names."""
    if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
        return False
    return messages.is_text(node.value) and not any(messages.side_effects([node.value]))


def _targets(node: ast.AST) -> set[str]:
    return {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}


def _within(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes in a function; of a nested class only the names, because its assignments are attributes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from (part for part in ast.walk(child) if isinstance(part, ast.Name))
        else:
            yield child
            yield from _within(child)


def _remove(node: ast.AST, statements: set[int]) -> None:
    for child in (node, *_within(node)):
        for field in ("body", "orelse", "finalbody"):
            if isinstance(inner := getattr(child, field, None), list):
                setattr(child, field, [item for item in inner if id(item) not in statements])


def _made(value: ast.expr | None) -> Iterator[ast.Call]:
    """Yield the calls that create a raised exception, in all branches of an `or` or a conditional expression."""
    if isinstance(value, ast.Call):
        yield value
    elif isinstance(value, ast.BoolOp):
        yield from (call for part in value.values for call in _made(part))
    elif isinstance(value, ast.IfExp):
        yield from (*_made(value.body), *_made(value.orelse))


def _last_name(value: ast.AST) -> str:
    """Return the last name of `a.b`, `a.b(...)` or `a.b[...]`."""
    if isinstance(value, ast.Call):
        return _last_name(value.func)
    if isinstance(value, ast.Subscript):
        return _last_name(value.value)
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


def _listed(found: ast.stmt | list[ast.stmt] | None) -> list[ast.stmt]:
    return [] if found is None else found if isinstance(found, list) else [found]
