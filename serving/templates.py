"""Chat templates, rendered as Transformers renders them, within a bound on time and size.

The environment is that of `transformers.utils.chat_template_utils`: a sandbox with loop controls, the `generation` tag,
`tojson` and `raise_exception`; tools and documents are undefined-like (None). A template comes with a model and is not
trusted: its loops and texts are bounded, which the sandbox does not do.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import FrameType
from typing import Any

from serving.errors import InputError

MAX_SECONDS = 2.0  # of processor time of the rendering thread
MAX_CHARACTERS = 2**22  # of a rendered conversation, and of any text that an operator makes
Message = Mapping[str, str]


class TooLongError(Exception):
    """A template exceeded a bound."""


class ChatTemplate:
    """A chat template with the special tokens that it may use."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source, self.tokens = source, dict(tokens)

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as text, with the generation prompt; raise InputError if the template rejects it."""
        names = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            with _deadline():
                parts, size = [], 0
                for part in self._template.generate(**self.tokens | names):
                    parts.append(part)
                    size += len(part)
                    _check_size(size)
        except TooLongError as error:
            raise _rejection(f"it {error}", status=500) from None
        except Exception as error:  # of the template's own code: any
            raise _rejection(str(error) or type(error).__name__) from None
        return "".join(parts)

    @cached_property
    def _template(self) -> Any:
        return _environment().from_string(self.source)


def _rejection(reason: str, status: int = 400) -> InputError:
    message = f"The model's chat template rejects this conversation: {reason}"
    return InputError(message, field="messages", code="chat_template", status=status)


def _raise_exception(message: str) -> None:
    """The `raise_exception` of chat templates."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    """The `tojson` of chat templates: unlike Jinja's it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> Any:
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        """Compiles `~` to `Environment.join`."""

        def visit_Concat(self, node: Any, frame: Any) -> None:
            self.write("environment.join((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, with a bound on what an operator computes in one step: no trace can interrupt it."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))
        code_generator_class = Generator

        def join(self, parts: Sequence[Any]) -> str:
            texts = [str(part) for part in parts]
            _check_size(sum(map(len, texts)))
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols])
    environment.filters["tojson"] = _to_json
    for name in ("center", "indent", "format", "wordwrap"):  # they can pad a text to any size
        environment.filters[name] = _bounded_filter(environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise TooLongError for a product of a text or list, a power or a format that would be too large."""
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _check_size(len(left) + len(right))
    sizes = [(a, b) for a, b in ((left, right), (right, left)) if hasattr(a, "__len__") and isinstance(b, int)]
    if operator == "*" and any(len(a) * b > MAX_CHARACTERS for a, b in sizes):
        raise TooLongError("makes a text that is too long")
    if operator == "**" and isinstance(right, int) and abs(right) > 64:
        raise TooLongError("makes a number that is too large")
    if operator == "%" and isinstance(left, str) and any(len(part) > 4 for part in _digits(left)):
        raise TooLongError("makes a text that is too long")


def _digits(text: str) -> list[str]:
    return "".join(character if character.isdigit() else " " for character in text).split()


def _bounded_filter(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        numbers = (value for value in (*arguments, *named.values()) if isinstance(value, int))
        if any(number > MAX_CHARACTERS for number in numbers):
            raise TooLongError("makes a text that is too long")
        return original(*arguments, **named)

    if hasattr(original, "jinja_pass_arg"):  # whether it also takes the environment or the context
        call.jinja_pass_arg = original.jinja_pass_arg  # type: ignore[attr-defined]
    return call


def _generation_tag() -> Any:
    """Return the extension for `{% generation %}`, which marks an assistant's turn and writes its content as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationTag


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TooLongError(f"makes a text of more than {MAX_CHARACTERS:,} characters")


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise TooLongError in this thread once it has computed for MAX_SECONDS: Python checks at each line it runs."""
    end, previous = time.thread_time() + MAX_SECONDS, sys.gettrace()

    def check(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.thread_time() > end:
            sys.settrace(previous)
            raise TooLongError(f"computes for more than {MAX_SECONDS:g} seconds")
        return check

    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(previous)
