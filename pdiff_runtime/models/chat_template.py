"""Chat templates of other people: rendered in a sandbox, with bounds on time and memory.

Every loop iteration, call and filter is a step. Every value that an expression builds is weighed
as it would be when written out in full, nested values again each time they occur. Steps and
characters come out of one budget per rendering, so no value can become large, and whatever goes
through a value (printing, comparing, JSON) ends soon.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
from jinja2.utils import Namespace

_MAX_SOURCE_CHARS = 1 << 17
_MAX_STEPS = 1 << 18
_MAX_CHARS = 1 << 23  # of the prompt and of all text on the way
_MAX_SECONDS = 1.0  # of the thread's own time
_MAX_BITS = 1 << 9  # of an integer
_MAX_STRIPPED = 1 << 8  # characters to strip off

# They pad text to any width they are told or take time out of proportion, or give bytes, which
# have the same methods. No template needs them.
_REFUSED_METHODS = {
    "center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "striptags",
    "to_bytes", "translate", "unescape", "zfill",
}  # fmt: skip
_REFUSED_FILTERS = {
    "batch", "center", "format", "indent", "pprint", "round", "slice", "striptags", "sum", "urlize",
    "wordwrap", "xmlattr",
}  # fmt: skip


@dataclasses.dataclass
class _Budget:
    """What is left for one rendering."""

    steps: int = _MAX_STEPS
    chars: int = _MAX_CHARS
    deadline: float = dataclasses.field(default_factory=lambda: time.thread_time() + _MAX_SECONDS)


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


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
            trim_blocks=True, lstrip_blocks=True, finalize=_weighed,
            extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
        )  # fmt: skip
        for name in ("cycler", "joiner", "lipsum"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "replace": _replace, "join": _join, "trim": _trim}
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        self.filters |= {
            "_counted": _counted, "_concatenated": _concatenated, "_weighed": _weighed
        }  # fmt: skip

    concat = staticmethod(lambda pieces: _concatenated(pieces))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        """Count the iterations of every loop, and weigh what literals, slices and ``~`` build."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = _filtered(loop.iter, "_counted")
        for parent in (tree, *tree.find_all(jinja2.nodes.Node)):
            for field, value in parent.iter_fields():
                setattr(parent, field, _with_weights(value))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute."""
        is_refused = isinstance(obj, str | int) and attr in _REFUSED_METHODS
        return not is_refused and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        """Refuse, where Jinja's own would print nothing."""
        raise jinja2.sandbox.SecurityError(f"{attribute!r} of {type(obj).__name__!r} is unsafe")

    def wrap_str_format(self, value: Any) -> None:
        """None: ``str.format`` is no exception to :meth:`is_safe_attribute`."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method for the template."""
        _step()
        for arg in (*args, *kwargs.values()):  # a macro gets them as one value, too
            if not isinstance(arg, Namespace):
                _weighed(arg)
        text, method = getattr(__obj, "__self__", None), getattr(__obj, "__name__", None)
        if isinstance(text, str) and method == "replace":
            return _replace(text, *args, **kwargs)
        if isinstance(text, str) and method == "join":
            (items,) = args
            return _join(items, text)
        if isinstance(text, str) and method in ("strip", "lstrip", "rstrip"):
            _check_stripped(*args)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else _weighed(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, for operators whose result can be large."""
        _check_operands(operator, left, right)
        return _weighed(super().call_binop(context, operator, left, right))


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model is trained on; a prompt just has its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _with_weights(value: Any) -> Any:
    nodes = jinja2.nodes
    if isinstance(value, list):
        return [_with_weights(item) for item in value]
    if isinstance(value, nodes.Concat):
        return _filtered(nodes.List(value.nodes, lineno=value.lineno), "_concatenated")
    is_literal = isinstance(value, nodes.List | nodes.Dict)
    is_literal |= isinstance(value, nodes.Tuple) and value.ctx == "load"
    is_slice = isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice)
    return _filtered(value, "_weighed") if is_literal or is_slice else value


def _bounded(act: Callable[[], Any]) -> Any:
    token = _budget.set(_Budget())
    try:
        return act()
    except Exception as error:  # a template can raise whatever an expression can
        raise ValueError(f"chat template: {error or type(error).__name__}") from error
    finally:
        _budget.reset(token)


def _step() -> None:
    budget = _budget.get()
    budget.steps -= 1
    if budget.steps < 0:
        raise ValueError(f"more than {_MAX_STEPS} steps")
    if time.thread_time() > budget.deadline:
        raise ValueError(f"more than {_MAX_SECONDS} s")


def _spend(num_chars: int) -> None:
    budget = _budget.get()
    budget.chars -= num_chars
    if budget.chars < 0:
        raise ValueError(f"more than {_MAX_CHARS} characters")


def _weighed(value: Any) -> Any:
    _spend(_weight(value))
    return value


def _weight(value: Any) -> int:
    """Characters of a value when written out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):  # it may hold itself
        raise ValueError("a namespace inside a value, or printed")
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    elif not isinstance(value, list | tuple | set | KeysView | ValuesView | ItemsView):
        return len(str(value)) if isinstance(value, int | float) else 1
    total = 0
    for item in value:
        _step()
        total += 2 + _weight(item)
    return total


def _check_operands(operator: str, left: Any, right: Any) -> None:
    are_integers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and are_integers and left.bit_length() * right > _MAX_BITS:
        raise ValueError(f"an integer of more than {_MAX_BITS} bits")
    if operator == "*" and are_integers and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise ValueError(f"an integer of more than {_MAX_BITS} bits")
    if operator == "*" and not are_integers:
        for items, times in ((left, right), (right, left)):
            if hasattr(items, "__len__") and isinstance(times, int):
                _spend(len(items) * times)
    if operator == "%" and isinstance(left, str):
        if re.search(r"\d{4}|\*", left):
            raise ValueError(f"a format with a width: {left[:40]!r}")
        _spend(left.count("%") * (1000 + _weight(right)))


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step, and whose result is weighed."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _step()
        return _weighed(function(*args, **kwargs))

    return checked


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _concatenated(pieces: Iterable[Any]) -> str:
    return "".join(str(_weighed(piece)) for piece in pieces)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(_weighed(text))
    _spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _trim(text: Any, chars: str | None = None) -> str:
    _check_stripped(chars)
    return str(_weighed(text)).strip(chars)


def _check_stripped(chars: str | None = None) -> None:
    if chars is not None and len(chars) > _MAX_STRIPPED:
        raise ValueError(f"more than {_MAX_STRIPPED} characters to strip")


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
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _concatenated(_counted(encoder.iterencode(value)))


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _raise_exception(message: str) -> None:
    raise ValueError(message)
