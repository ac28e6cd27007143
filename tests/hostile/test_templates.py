"""Chat templates that are damaged, or made to harm: they render, or one sentence says why not, within limits."""

import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from families import FAMILIES
from hostile import INPUTS, attack, damaged_bytes, survive
from qlora_trainer.data import template_limits
from qlora_trainer.data.chat_template import ChatTemplate, TemplateSettings
from qlora_trainer.data.records import Message

pytestmark = pytest.mark.process

MESSAGES = [Message("system", "Be brief."), Message("user", "A?"), Message("assistant", "B.")]
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?")),
    bos_token="<s>",
    eos_token="</s>",
)
OUTSIDE = (
    "<code object",
    "<frame",
    "<module",
    "__builtins__",
    "'os'",
    "Popen",
    "root:x:",
)
"""What a text shows that has reached beyond its data. The helpers that every template has may show their names."""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may take two minutes at most, and an input of the tests seconds."""
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 2.0)


def render(source: str) -> None:
    """As for a record, and with tools."""
    template = ChatTemplate(TOKENIZER, TemplateSettings(source=source))
    text, _ = template.render(
        MESSAGES, "data.jsonl: line 3", tools=[{"name": "f"}] if "tools" in source else ()
    )
    reached = [mark for mark in OUTSIDE if mark in text]
    assert not reached, f"reached {reached}: {source}"


# --- templates made of what templates are made of

NAMES = ("messages", "n", "n.s", "m", "tools", "loop", "self", "bos_token", "cycler", "joiner", "lipsum", "namespace",
         "dict", "range", "raise_exception", "strftime_now", "varargs", "caller", "f", "none", "''", "'%s'", "'{0}'",
         "('x'.encode())", "[]", "{}", "0", "1", "-1", "9 ** 9", "10 ** 30", "99999", "1.5", "'x' * 999")  # fmt: skip
ATTRIBUTES = ("s", "role", "content", "__class__", "__init__", "__globals__", "__mro__", "__subclasses__", "__self__",
              "__func__", "__code__", "gi_frame", "f_globals", "_meter", "environment", "items", "format", "join",
              "replace", "center", "to_bytes", "encode", "append", "index", "ljust", "zfill", "expandtabs", "next",
              "__dict__", "__getattribute__", "mro", "last", "cycle", "previtem")  # fmt: skip
FILTERS = ("tojson", "string", "list", "join", "join(n.s)", "replace('x', 'xx')", "map(attribute='__class__')",
           "center(99999)", "indent(99999)", "format(9)", "attr('__class__')", "batch(2)", "slice(999999999)", "first",
           "groupby('role')", "sort", "unique", "sum", "sum(start=[])", "upper", "pprint", "xmlattr", "urlize", "int",
           "wordwrap(1)", "map('upper')", "select", "dictsort", "items", "reverse", "trim", "truncate(9)", "wordcount",
           "filesizeformat", "striptags", "random", "min", "round(999)", "escape", "safe",
           "default(n)", "length")  # fmt: skip
OPERATORS = ("+", "*", "**", "%", "~", "-", "/", "//", "==", "<", "in", "and", "or")


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions made of others."""
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("{}.{}".format, inner, st.sampled_from(ATTRIBUTES)),
        st.builds("{}['{}']".format, inner, st.sampled_from(ATTRIBUTES)),
        st.builds("({} | {})".format, inner, st.sampled_from(FILTERS)),
        st.builds("{}({})".format, inner, inner),
        st.builds("[{0}, {0}]".format, inner),
        st.builds("({0}, {0})".format, inner),
        st.builds("{{'a': {0}, 'b': {0}}}".format, inner),
        st.builds("{}[{}:]".format, inner, inner),
        st.builds("namespace(s={0}, t={0})".format, inner),
    )


EXPRESSIONS = st.recursive(st.sampled_from(NAMES), grown, max_leaves=6)
STATEMENTS = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSIONS),
    st.builds("{{% set n.s = {} %}}".format, EXPRESSIONS),
    st.builds("{{% set m = {} %}}".format, EXPRESSIONS),
    st.builds("{{% if {} %}}x{{% endif %}}".format, EXPRESSIONS),
    st.builds(
        "{{% for a in {} %}}{{% set n.s = {} %}}{{{{ a }}}}{{% endfor %}}".format, EXPRESSIONS, EXPRESSIONS
    ),
    st.builds("{{% for a in range(70) %}}{{% set n.s = {} %}}{{% endfor %}}".format, EXPRESSIONS),
    st.builds("{{% for a in messages recursive %}}{{{{ loop({}) }}}}{{% endfor %}}".format, EXPRESSIONS),
    st.builds("{{% macro f(m) %}}{{{{ f({}) }}}}{{% endmacro %}}".format, EXPRESSIONS),
    st.builds("{{% call f({}) %}}x{{% endcall %}}".format, EXPRESSIONS),
    st.builds("{{% filter {} %}}{{{{ n.s }}}}{{% endfilter %}}".format, st.sampled_from(FILTERS)),
)
TEMPLATES = st.lists(STATEMENTS, min_size=1, max_size=6).map(
    lambda parts: "{% set n = namespace(s='x') %}{% set m = 'y' %}" + "".join(parts) + "{{ n.s }}"
)


@INPUTS
def test_a_template_of_anything_renders_or_is_refused(inputs: int) -> None:
    """Within seconds and bounded memory, without a look at anything but its data."""
    attack(inputs, TEMPLATES, render)


@INPUTS
def test_a_damaged_template_renders_or_is_refused(inputs: int) -> None:
    """Those of models, torn and joined."""
    right = [family.template.encode() for family in FAMILIES]
    attack(inputs, damaged_bytes(right).map(lambda data: data.decode(errors="replace")), render)


GROWING = "{% set n = namespace(s=START) %}{% for a in range(99) %}{% set n.s = MORE %}{% endfor %}{{ USE }}"


def growing(start: str, more: str, use: str = "n.s") -> str:
    """A template in which something grows 99 times."""
    return GROWING.replace("START", start).replace("MORE", more).replace("USE", use)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ 'x'.encode().center(10 ** 10) }}", id="bytes, padded"),
        pytest.param("{{ ('\\t'.encode() * 9).expandtabs(10 ** 10) }}", id="bytes with tabs"),
        pytest.param("{{ '\\t'.expandtabs(10 ** 10) }}", id="a text with tabs"),
        pytest.param("{{ (1).to_bytes(10 ** 10, 'big') }}", id="a number of bytes"),
        pytest.param(growing("9", "n.s * n.s"), id="a number squared"),
        pytest.param(growing("9", "n.s ** 64"), id="a number to a power"),
        pytest.param(growing("'x'.encode()", "n.s.replace('x'.encode(), 'xx'.encode())"), id="bytes replaced"),
        pytest.param(growing("'x'.encode()", "n.s.join([n.s] * 9)"), id="bytes joined"),
        pytest.param(growing("[1]", "[n.s, n.s]"), id="lists of lists"),
        pytest.param(growing("[1]", "[n.s, n.s]", "n.s | tojson"), id="lists of lists as JSON"),
        pytest.param(growing("(1, 2)", "(n.s, n.s)", "{n.s: 1}"), id="a key of tuples"),
        pytest.param(growing("[1]", "[n.s, n.s]", "n.s == [n.s, n.s]"), id="lists of lists compared"),
        pytest.param(growing("{}", "{'a': n.s, 'b': n.s}"), id="maps of maps"),
        pytest.param(growing("{}", "dict(a=n.s, b=n.s)"), id="maps of maps by a call"),
        pytest.param(growing("1", "namespace(a=n.s, b=n.s)"), id="namespaces of namespaces"),
        pytest.param(growing("[1]", "[n.s, n.s]", "'%s' % (n.s,)"), id="lists of lists in a format"),
        pytest.param(growing("[1]", "[n.s, n.s]", "'{}'.format(n.s)"), id="lists of lists in a format by a method"),
        pytest.param("{% macro f(k) %}{% if k %}{{ f(k - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
                     "{% endmacro %}{{ f(90, 1) }}", id="arguments of arguments"),
        pytest.param(growing("[1]", "[n.s] | batch(1, n.s) | list", "n.s | string"), id="batches of lists"),
        pytest.param("{{ lipsum(n=10 ** 9) }}", id="much text"),
        pytest.param("{{ lipsum(n=99, max=10 ** 9, min=10 ** 8) }}", id="long paragraphs"),
        pytest.param("{{ messages | slice(10 ** 9) | list }}", id="many slices"),
        pytest.param("{{ [1] | batch(10 ** 9, 1) | list }}", id="a batch, filled up"),
        pytest.param("{{ range(99999) | list | tojson(indent=99999) }}", id="JSON with an indent"),
        pytest.param("{{ ('x ' * 99999) | wordwrap(1, wrapstring='y' * 99999) }}", id="lines wrapped"),
        pytest.param("{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", id="a loop in itself"),
        pytest.param("{% set n = namespace() %}{% set n.n = n %}{{ n }}", id="a namespace in itself"),
        pytest.param("{{ '{0.__class__}'.format(1) }}{{ '{0[__class__]}'.format({}) }}", id="walks in a format"),
        pytest.param("{{ {'a': 1}.items().__class__ }}{{ messages | map(attribute='__class__') | list }}", id="walks"),
        pytest.param("{% include '/etc/passwd' %}", id="a file"),
        pytest.param("{% import 'os' as os %}{{ os.environ }}", id="an import"),
        pytest.param("{{ self._TemplateReference__context.environment }}", id="the environment"),
        pytest.param("(" * 5_000, id="text"),
        pytest.param("{{ " + "(" * 5_000 + ")" * 5_000 + " }}", id="brackets"),
        pytest.param("{{ 1" + " + 1" * 10_000 + " }}", id="a long sum"),
        pytest.param("{% if 1 %}" * 500 + "{% endif %}" * 500, id="conditions within conditions"),
        pytest.param("{% for a in messages %}" * 40 + "{% endfor %}" * 40, id="loops within loops"),
        pytest.param("x" * 2_000_000, id="a template of 2 MB"),
    ],
)  # fmt: skip
def test_a_template_that_was_made_to_harm_is_stopped(template: str) -> None:
    """It renders within the limits, or one sentence says why not."""
    survive(render, template)
