"""Chat templates: what transformers offers them, and what a hostile one does not get."""

from __future__ import annotations

import datetime

import pytest

from pdiff_runtime.models.chat_template import ChatTemplate


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(**variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}"
         "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}"
         "{% endfor %}{{ ns.n }}", "10"),
        ("{% for i in 'abc' %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}"
         "{{ loop.previtem }}{% endfor %}", "1/3,2/3,a3/3b"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}", "23"),
        ("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ none }}{% endfor %}", "a1None"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) ~ m(2) }}", "[1][2]"),
        ("{% generation %}{{ 'a' }}{% endgeneration %}b", "ab"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ '-'.join(['c', 'd']) }}", "a+bc-d"),
        ("{{ 'aXbX'.replace('X', '-') }}{{ 'aX' | replace('X', '!') }}", "a-b-a!"),
        ("{{ [{'n': 1}, {'n': 2}] | map(attribute='n') | join(',') }}", "1,2"),
        ("{{ '%s-%02d' % ('a', 7) }}{{ '-' * 3 }}{{ 2 ** 8 }}", "a-07---256"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ 'x' if missing is defined else 'y' }}{{ missing }}", "y"),
        ("{{ '  a '.strip() }}{{ 'A' | lower }}{{ [3, 1] | sort | first }}", "aa1"),
    ],
)  # fmt: skip
def test_templates_have_what_transformers_gives_them(source, text):
    assert render(source) == text


def test_templates_can_refuse():
    with pytest.raises(ValueError, match="^chat template: No system role!$"):
        render("{{ raise_exception('No system role!') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ('' | attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% set x = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ [].__class__.__base__.__subclasses__()[100]('x') }}",
    ],
)
def test_templates_do_not_reach_python(source):
    with pytest.raises(ValueError, match="^chat template: "):
        render(source, messages=[1])


GROW = (
    "{%% set ns = namespace(x=%s) %%}{%% for i in range(30) %%}{%% set ns.x = %s %%}{%% endfor %%}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set l = 'aaaaaaaaaa' %}" + "{% for i in l %}" * 18 + "{% endfor %}" * 18,
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{{ range(10**9) }}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**(10**10) }}",
        "{% set ns = namespace(n=9**9) %}{% for i in range(50) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}",
        "{% set ns = namespace(s=[1, 2]) %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(50) %}"
        "{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}{% endfor %}",
        "{% set ns = namespace(s='a' * 999) %}{% for i in range(9) %}"
        "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='a' * 999) %}{% for i in range(9) %}"
        "{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='a' * 999) %}{% for i in range(9) %}"
        "{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='a' * 999) %}{% for i in range(9) %}"
        "{% set ns.s = ns.s | join(ns.s) %}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.center(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ lipsum(n=999999) }}",
        "{{ 'a' * 9999999 }}{{ 'a' * 9999999 }}",
        "{{ [1] | tojson(indent=999999999) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(19) }}",
        GROW % ("'x'", "[ns.x, ns.x]") + "{{ ns.x }}",
        GROW % ("'x'", "[ns.x, ns.x]"),
        "{% set x = 'a' * 4000000 %}{% for i in range(9) %}{% set y = x[1:] %}{% endfor %}",
        GROW % ("'x'", "(ns.x, ns.x)") + "{{ ns.x | tojson }}",
        GROW % ("'x'", "{'a': ns.x, 'b': ns.x}") + "{{ 'a%s' % ns.x }}",
        GROW % ("'x'", "dict(a=ns.x, b=ns.x)") + "{{ '' ~ ns.x }}",
        GROW % ("['x']", "[ns.x] * 2") + "{{ ns.x == ns.x[:] }}",
        "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}"
        "{% set ns = namespace(x='x') %}{% for i in range(30) %}{{ m(ns.x, ns.x) }}{% endfor %}",
        "{% set n = namespace(x='x') %}{{ n }}",
        "{{ [namespace(x='x')] }}",
        "{{ ([['a' * 4000000]] * 400) | tojson }}",
        "{{ ('%s' * 400) % (('a' * 4000000,) * 400) }}",
        "{{ '%(a)s' * 400 % {'a': 'a' * 4000000} }}",
        GROW % ("[]", "ns.x + ['a' * 4000000 ~ i]"),
        GROW % ("'a' * 4000000", "ns.x | upper"),
        GROW % ("'a' * 4000000", "ns.x.upper()"),
        GROW % ("'a' * 4000000", "ns.x[0:]"),
        GROW % ("'ab' * 2000000", "ns.x.partition('b') | join"),
        "{{ [[1], [2]] | sum(start=[]) }}",
        "{{ 1 | round(-99999999) }}",
        "{{ ('a' * 999).strip('b' * 999) }}",
        "{{ ('a' * 999) | trim('b' * 999) }}",
        "{{ (5).to_bytes(99999999, 'big') }}",
        "{{ 'a'.encode().center(99999999) }}",
        "{{ ('a' * 999).translate({97: 'a' * 999999}) }}",
    ],
)
def test_templates_come_to_an_end(source):
    with pytest.raises(ValueError, match="^chat template: "):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 9000000 }}", "more than 8388608 characters"),
        ("{{ (2**200) ** 500 }}", "an integer of more than 512 bits"),
        ("{{ (2**200) * (2**400) }}", "an integer of more than 512 bits"),
        ("{{ '%2000d' % 1 }}", "a format with a width: '%2000d'"),
        ("{{ '%.2000f' % 1 }}", "a format with a width"),
        ("{{ '%*d' % (2, 1) }}", "a format with a width"),
        ("{{ [1] | tojson(indent=17) }}", "expected an indent up to 16, got 17"),
        ("{{ [1] | tojson(indent='  ') }}", "expected an indent up to 16, got '  '"),
        *((f"{{{{ 'a'.{method} }}}}", f"'{method}' of 'str' is unsafe") for method in (
            "center", "encode", "expandtabs", "format", "format_map", "ljust", "rjust", "translate",
            "zfill")),
        ("{{ ('a' | safe).striptags() }}", "'striptags' of 'Markup' is unsafe"),
        ("{{ ('a' | safe).unescape() }}", "'unescape' of 'Markup' is unsafe"),
        ("{{ 1.to_bytes }}", "'to_bytes' of 'int' is unsafe"),
        *((f"{{{{ 'a' | {name} }}}}", f"No filter named '{name}'") for name in (
            "batch", "center", "format", "indent", "pprint", "round", "slice", "striptags", "sum",
            "urlize", "wordwrap", "xmlattr")),
    ],
)  # fmt: skip
def test_why_a_template_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        render(source)


def test_a_rendering_has_a_deadline(monkeypatch):
    seconds = iter(range(99))
    monkeypatch.setattr("time.thread_time", lambda: next(seconds))
    with pytest.raises(ValueError, match=r"more than 1\.0 s"):
        render("{% for i in range(9) %}{% endfor %}")


def test_a_long_conversation_is_rendered():
    messages = [{"role": "user", "content": "word " * 1000}] * 200
    source = (
        "{% for m in messages[0:] %}{{ '<' + m['role'] + '>' + m['content'] | trim }}{% endfor %}"
    )
    assert len(render(source, messages=messages)) == 200 * (len("<user>") + 4999)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ " + "(" * 5000, "{% unheard_of %}", 7, "a" * (1 << 21)]
)
def test_templates_that_do_not_compile(source):
    with pytest.raises(ValueError, match="^chat template: "):
        ChatTemplate(source)


def test_one_rendering_does_not_pay_for_another():
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}a")
    assert [template.render() for _ in range(5)] == ["a"] * 5
