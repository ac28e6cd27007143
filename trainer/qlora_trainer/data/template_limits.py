"""Chat templates run in a sandbox, and within limits.

A template is a program that comes with a model, and its conversation comes from anywhere. transformers' environment
keeps it from reaching beyond its data (jinja2's sandbox). This one keeps it, besides, from running or growing without
end: every round of a loop and every call of a macro is counted, and every text that is put together is measured.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

MAX_STEPS = 500_000
"""Rounds of loops and calls of macros for one conversation. Templates of models take some per message; some look at
every later message from each."""
MAX_SECONDS = 120.0
"""For what is slow otherwise: 100 times what the largest conversation takes on a slow machine."""
MIN_CHARACTERS = 2**20
"""Characters that any conversation may take to be put together, times COPIES."""
COPIES = 128
"""How often a text may be copied while it is put together: templates add a message at a time to what they have."""
MAX_WIDTH = 100_000
"""The largest number that a template may pad, indent or wrap with."""
MAX_BITS = 100_000
"""Of a number that a template makes."""
PART = 256
"""Characters that anything in a list or a map counts as, besides its own."""
# fmt: off
DEEP = frozenset((
    "capitalize", "center", "dictsort", "e", "escape", "forceescape", "format", "groupby", "indent", "join", "lower",
    "pprint", "replace", "safe", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "truncate", "unique",
    "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr",
))
# fmt: on
"""Filters that look at all that is in what they are given."""
_OF_DICTS = frozenset(dir(dict))
_OF_LOOPS = frozenset(("first", "last", "index", "index0", "previtem", "nextitem"))


T = TypeVar("T")


class LimitError(Exception):
    """A template takes more than any conversation needs; says what."""


class _Meter:
    """What is left of the limits, while one conversation is written."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, given: int) -> None:
        """Start anew, for a conversation of so many characters."""
        self.steps = MAX_STEPS
        self.characters = COPIES * max(MIN_CHARACTERS, given)
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """One more round or call."""
        self.steps -= 1
        if self.steps < 0:
            raise LimitError(f"takes more than {MAX_STEPS} steps")
        if not self.steps % 64 and time.monotonic() > self.deadline:
            raise LimitError(f"takes longer than {MAX_SECONDS:.0f} seconds")

    def reserve(self, characters: int) -> None:
        """A text, or a list, of so many is about to be made."""
        self.characters -= characters
        if self.characters < 0:
            raise LimitError("puts together far more text than the conversation has")

    def weigh(self, *values: Any) -> int:
        """Reserve, and return, the characters of values with all that is in them, once for each place it stands in."""
        before = self.characters
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if isinstance(value, Namespace):
                value = value._Namespace__attrs
            if isinstance(value, str | bytes):
                self.reserve(len(value))
            elif isinstance(value, Mapping):
                self.reserve(2 * PART * len(value))
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, list | tuple | set | frozenset):
                self.reserve(PART * len(value))
                waiting += value
            else:
                self.reserve(PART)
        return before - self.characters


def _size(value: Sequence[Any]) -> int:
    """Bytes, about, without what is in its parts."""
    return len(value) if isinstance(value, str | bytes) else 8 * len(value)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise LimitError(f"makes a number of more than {MAX_BITS} bits")


def _too_wide() -> NoReturn:
    raise LimitError(f"pads, indents or wraps with a number above {MAX_WIDTH}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with limits. Whatever exceeds them raises LimitError."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, theirs: jinja2.Environment) -> None:
        """With the extensions, filters and globals of another."""
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            finalize=self._written,
        )
        self.meter = _Meter()
        self.filters.update({name: self._bounded(name, run) for name, run in theirs.filters.items()})
        self.globals.update(theirs.globals)
        del self.globals["lipsum"]  # as much text as it is asked for, and of use to nobody here

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered(self).visit(source), *args, **kwargs)

    @property
    def one_step(self) -> None:
        """Counts a round of a loop, or a call of a macro: read there, since that costs less than a call."""
        self.meter.step()

    def weighed(self, value: T) -> T:
        """A list, tuple or map that has just been made."""
        self.meter.weigh(value)
        return value

    def _written(self, value: T) -> T:
        """What is about to be written."""
        if not isinstance(value, str):
            self.meter.weigh(value)
        return value

    def join_texts(self, *parts: Any) -> str:
        """The operator `~`."""
        self.meter.weigh(*parts)
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, once it is known what it makes."""
        if operator == "+" and type(left) is str and type(right) is str:
            # What templates do most of all: a third of the time of a conversation's text goes without this shortcut.
            self.meter.reserve(len(left) + len(right))
            return left + right
        match operator:
            case "+" if isinstance(left, Sequence) and isinstance(right, Sequence):
                self.meter.reserve(_size(left) + _size(right))
            case "*" if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
            case "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, Sequence) and isinstance(times, int):
                        self.meter.reserve(self.meter.weigh(many) * max(times, 0))
            case "**" if not (isinstance(right, int | float) and abs(right) <= 64):
                raise LimitError("raises a number to a power above 64")
            case "**" if isinstance(left, int):
                _check_bits(int(left.bit_length() * abs(right)))
            case "%" if isinstance(left, str | bytes):
                self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute or item. Most are of messages and of loops: these go without the sandbox's questions."""
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is LoopContext and attribute in _OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call, once it is known what a method of a text or a number makes."""
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox has its own str.format around Python's
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            __self._check(method.__name__, owner, args, kwargs)
        elif __obj is dict or __obj is Namespace:
            __self.meter.weigh(*args, *kwargs.values())
        return super().call(__context, __obj, *args, **kwargs)

    def _bounded(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        skipped = int(getattr(run, "jinja_pass_arg", None) is not None)

        @wraps(run)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, *more = args[skipped:]
            self._check(name, value, more, kwargs)
            return run(*args, **kwargs)

        return bounded

    def _check(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Count what a filter, or a method of a text or a number, is about to make."""
        given = (*args, *kwargs.values())
        width = max((each for each in given if isinstance(each, int)), default=0)
        if width > MAX_WIDTH and name not in ("default", "d", "round", "int"):
            _too_wide()
        texts = [each for each in given if isinstance(each, str | bytes)]
        if isinstance(value, str | bytes):
            self.meter.reserve(len(value))
            if name in ("format", "format_map"):
                self._check_format(value, given)
            elif name == "replace" and texts:
                self.meter.reserve((len(value) // max(1, len(texts[0])) + 1) * len(texts[-1]))
            elif name in ("indent", "expandtabs", "wordwrap"):
                self.meter.reserve(len(value) * max([width if name != "wordwrap" else 0, *map(len, texts)]))
            elif name == "join" and args and not isinstance(args[0], str | bytes):
                self.meter.weigh(args[0])
                self.meter.reserve(len(value) * (len(args[0]) if hasattr(args[0], "__len__") else 0))
        elif name in DEEP:
            weight = self.meter.weigh(value)
            if name == "tojson":
                self.meter.reserve(weight * width)
            elif name == "join":
                self.meter.reserve(weight // PART * sum(map(len, texts)))

    def _check_format(self, text: str | bytes, values: Any) -> None:
        """Count what a format is about to make of values, each of which may stand in each of its places."""
        form = text if isinstance(text, str) else text.decode("latin-1")
        if re.search(r"\d{6,}|\*", form):
            _too_wide()
        places = form.count("%") + form.count("{")
        widths = sum(int(number) for number in re.findall(r"\d{1,5}", form)) if places else 0
        self.meter.reserve(widths + places * self.meter.weigh(values))


class _Metered(NodeTransformer):
    """Puts a count into every loop and macro, and measures what `~` joins and what lists and maps hold."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:  # noqa: N802 - jinja2's name
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("one_step"), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For  # noqa: N815

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict | nodes.Name) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or _is_constant(node):
            return node
        return self._call("weighed", [node], node.lineno)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802
        """The arguments of a macro that it does not name are a list and a map, too."""
        return self.visit_List(node) if node.name in ("varargs", "kwargs") else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("join_texts", node.nodes, node.lineno)

    def _call(self, name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
        method = nodes.EnvironmentAttribute(name)
        return nodes.Call(method, arguments, [], None, None, lineno=line, environment=self._environment)


def _is_constant(node: nodes.Expr) -> bool:
    """Whether it is what the template's text says, whose size nobody needs to measure."""
    try:
        node.as_const()
    except nodes.Impossible:
        return False
    return True


@lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """A chat template within limits, as transformers would render it. Raises jinja2.TemplateSyntaxError."""
    # Theirs is that of another template: even to compile this one there could take all memory.
    template = BoundedEnvironment(_compile_jinja_template("").environment).from_string(source)
    template.globals = dict(
        template.globals
    )  # of several maps, which are put together for each conversation otherwise
    return template


def render(
    template: jinja2.Template, given: int, *, marked: bool, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans that generation markers are around.

    Args:
        template: of `compiled`.
        given: characters of the conversation.
        marked: whether it has generation markers.
        variables: what the template may read; plain data.

    Raises:
        LimitError: it takes more than any conversation needs.
        Exception: whatever else the template raises.
    """
    environment = template.environment
    assert isinstance(environment, BoundedEnvironment)
    environment.meter.begin(given)
    if marked:
        text, spans = _render_with_assistant_indices(template, documents=None, **variables)
        return text, spans
    pieces = []
    for piece in template.generate(documents=None, **variables):
        environment.meter.reserve(len(piece))
        pieces.append(piece)
    return "".join(pieces), []
