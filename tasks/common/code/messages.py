"""Recognize messages in a syntax tree: the texts of errors, warnings, logs and progress bars.

A message ends at the terminal, so it cannot change a result, unless its text becomes data or an expression inside it
has side effects.
"""

import ast
from collections.abc import Iterator, Sequence

LOGGERS = ("logging", "logger", "log", "_logger", "_log", "LOGGER", "LOG")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")
STREAMS = ("stdout", "stderr")
ERROR_SUFFIXES = ("Error", "Exception", "Warning", "Exit")  # of the names of exception classes
PURE_BUILTINS = ("len", "str", "repr", "round", "abs", "int", "float", "type", "bool")
TEXT_METHODS = ("join", "format", "strip", "removeprefix", "removesuffix", "lower", "upper")
PROGRESS_BARS = ("tqdm", "trange")
PROGRESS_BAR_TEXTS = ("desc", "unit")  # keywords of a progress bar that are only displayed


def is_message(call: ast.expr) -> bool:
    """Return whether an expression is a call that only prints a message: `print`, a log line, a warning."""
    if not isinstance(call, ast.Call):
        return False
    name = dotted(call.func)
    if name == "print":
        files = [keyword.value for keyword in call.keywords if keyword.arg == "file"]
        return all(dotted(file).removeprefix("sys.") in STREAMS for file in files)
    owner, _, method = name.rpartition(".")
    if (method == "warn" and owner == "warnings") or (method == "write" and owner in PROGRESS_BARS):
        return True
    if method in LEVELS and isinstance(call.func, ast.Attribute):
        found = call.func.value
        made_here = isinstance(found, ast.Call) and dotted(found.func).endswith("getLogger")
        return made_here or owner.rpartition(".")[2] in LOGGERS
    return False


def is_error(call: ast.Call) -> bool:
    """Return whether a call creates an exception (by the name of its class) or is `sys.exit`."""
    name = dotted(call.func)
    return name.rpartition(".")[2].endswith(ERROR_SUFFIXES) or name == "sys.exit"


def is_progress_bar(call: ast.Call) -> bool:
    """Return whether a call creates a progress bar."""
    return dotted(call.func).rpartition(".")[2] in PROGRESS_BARS


def is_text(value: ast.expr) -> bool:
    """Return whether an expression is a text: a literal, an f-string, or a join, sum or choice of these."""
    if isinstance(value, ast.Constant):
        return isinstance(value.value, str)
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, ast.Add | ast.Mod) and (is_text(value.left) or is_text(value.right))
    if isinstance(value, ast.IfExp):
        return is_text(value.body) and is_text(value.orelse)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr in ("join", "format") and is_text(value.func.value)
    return isinstance(value, ast.JoinedStr)


def side_effects(values: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """Yield the outermost expressions whose evaluation may have side effects, such as `next(rows)`."""
    for value in values:
        if isinstance(value, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom) or (
            isinstance(value, ast.Call) and not _is_harmless(value)
        ):
            yield value
        else:
            yield from side_effects(list(ast.iter_child_nodes(value)))


def _is_harmless(call: ast.Call) -> bool:
    """Return whether a call has no side effects: a pure built-in, or a method of a literal text."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in TEXT_METHODS and is_text(call.func.value)
    return isinstance(call.func, ast.Name) and call.func.id in PURE_BUILTINS


def dotted(value: ast.expr) -> str:
    """Return `a.b.c` for an attribute expression, with an empty part for anything but a name."""
    if isinstance(value, ast.Attribute):
        return f"{dotted(value.value)}.{value.attr}"
    return value.id if isinstance(value, ast.Name) else ""
