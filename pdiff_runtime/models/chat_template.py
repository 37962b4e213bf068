"""Chat templates of other people: rendered in a sandbox, with bounded steps and bounded text."""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox

_MAX_SOURCE_CHARS = 1 << 20
_MAX_STEPS = 1 << 18  # loop iterations, calls and filters of one rendering
_MAX_CHARS = 1 << 24  # of the prompt and of any text on the way
_MAX_BITS = 1 << 12  # of an integer

# They pad text to any width they are told, and no template needs them.
_REFUSED_METHODS = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}
_REFUSED_FILTERS = {"batch", "center", "format", "indent", "slice", "wordwrap", "xmlattr"}

_steps_left = contextvars.ContextVar("steps_left", default=0)


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja, with what transformers offers to templates: ``tojson``, ``strftime_now``,
            ``raise_exception``, ``break`` and ``continue``, ``generation`` blocks.

    Raises:
        ValueError: It does not compile.
    """

    def __init__(self, source: str) -> None:
        if not isinstance(source, str) or len(source) > _MAX_SOURCE_CHARS:
            raise ValueError(
                f"chat template: expected at most {_MAX_SOURCE_CHARS} characters of text"
            )
        self._template = _bounded(lambda: _Sandbox().from_string(source))

    def render(self, **variables: Any) -> str:
        """The text of a prompt.

        Raises:
            ValueError: The template says so, fails, reaches for what the sandbox forbids, or does
                not come to an end.
        """
        return _bounded(lambda: self._template.render(**variables))


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which keeps a template from Python's insides, with bounds on its work."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )  # fmt: skip
        for name in ("cycler", "joiner", "lipsum"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "replace": _replace, "join": _join}
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        self.filters |= {"_counted": _counted, "_concatenated": _concatenated}

    concat = staticmethod(lambda pieces: _concatenated(pieces))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Count the iterations of every loop, and the characters of every ``a ~ b``."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "_counted")
        for parent in (tree, *tree.find_all(jinja2.nodes.Node)):
            for field, value in parent.iter_fields():
                setattr(parent, field, _without_concat(value))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute."""
        is_refused = isinstance(obj, str) and attr in _REFUSED_METHODS
        return not is_refused and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse, where Jinja's own would print nothing."""
        raise jinja2.sandbox.SecurityError(f"{attribute!r} of {type(obj).__name__!r} is unsafe")

    def wrap_str_format(self, value: Any) -> None:
        """None: ``str.format`` is no exception to :meth:`is_safe_attribute`."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for the template."""
        _step()
        text, method = getattr(__obj, "__self__", None), getattr(__obj, "__name__", None)
        if isinstance(text, str) and method == "replace":
            return _replace(text, *args, **kwargs)
        if isinstance(text, str) and method == "join":
            (items,) = args
            return _join(items, text)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, for operators whose result can be large."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model is trained on; a prompt just has its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _without_concat(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_concat(item) for item in value]
    if isinstance(value, jinja2.nodes.Concat):
        pieces = jinja2.nodes.List(value.nodes, lineno=value.lineno)
        return _filtered(pieces, "_concatenated")
    return value


def _bounded(act: Callable[[], Any]) -> Any:
    token = _steps_left.set(_MAX_STEPS)
    try:
        return act()
    except Exception as error:  # a template can raise whatever an expression can
        raise ValueError(f"chat template: {error or type(error).__name__}") from error
    finally:
        _steps_left.reset(token)


def _step() -> None:
    left = _steps_left.get()
    if left == 0:
        raise ValueError(f"more than {_MAX_STEPS} steps")
    _steps_left.set(left - 1)


def _check_size(num_chars: int) -> None:
    if num_chars > _MAX_CHARS:
        raise ValueError(f"more than {_MAX_CHARS} characters")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    are_integers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and are_integers and left.bit_length() * right > _MAX_BITS:
        raise ValueError(f"an integer of more than {_MAX_BITS} bits")
    if operator == "*" and are_integers and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise ValueError(f"an integer of more than {_MAX_BITS} bits")
    if operator == "*" and not are_integers:
        for items, times in ((left, right), (right, left)):
            if hasattr(items, "__len__") and isinstance(times, int):
                _check_size(len(items) * times)
    if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
        _check_size(len(left) + len(right))
    if operator == "%" and isinstance(left, str) and re.search(r"\d{4}|\*", left):
        raise ValueError(f"a format with a width: {left[:40]!r}")


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step and returns no more text than allowed."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _step()
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    return checked


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _concatenated(pieces: Iterable[Any]) -> str:
    texts, num_chars = [], 0
    for piece in pieces:
        texts.append(str(piece))
        num_chars += len(texts[-1])
        _check_size(num_chars)
    return "".join(texts)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    pieces: list[Any] = []
    for item in items:
        piece = item if attribute is None else item[attribute]
        pieces += [separator, piece] if pieces else [piece]
    return _concatenated(pieces)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: without HTML escapes."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise ValueError(f"tojson: expected an indent up to 16, got {indent!r}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _raise_exception(message: str) -> None:
    raise ValueError(message)
