import json
from datetime import datetime
from pathlib import Path

import pytest
from chat_cases import HARMONY

from moejax.errors import MoejaxError
from moejax.inference.chat import find_template, render_chat

USER = [{"role": "user", "content": "Hi"}]
# In the manner of the ChatML templates, with the whitespace control and the checks that published templates use.
CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'user' %}
        {{- raise_exception('the first message must be from the user') }}
    {%- endif %}
    {{- bos_token if loop.first else '' }}{{ '<' + message.role + '>' }}
{{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}
"""


def test_messages_are_rendered_with_the_answers_beginning():
    messages = [
        *USER,
        {"role": "assistant", "content": " Hello ", "tool_calls": None},
        {"role": "user", "content": "Bye"},
    ]
    text = render_chat(CHATML, messages, {"bos_token": "<s>", "eos_token": "</s>"})
    assert text == "<s><user>\nHi</s>\n<assistant>\nHello</s>\n<user>\nBye</s>\n<assistant>\n"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é\'&>"}]'),
        (
            "{{ messages[0] | tojson(indent=1, ensure_ascii=true) }}",
            '{\n "role": "user",\n "content": "<\\u00e9\'&>"\n}',
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}", "7"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'none' if tools is none and documents is none else 'some' }}", "none"),
    ],
)
def test_the_environment_is_that_of_transformers(template, expected):
    assert render_chat(template, [{"role": "user", "content": "<é'&>"}], {}) == expected


def test_the_template_gets_a_copy_of_the_messages():
    messages = [{"role": "user", "content": "Hi", "name": None}]
    assert render_chat("{{ 'name' in messages[0] }}", messages, {}) == "False"
    assert messages == [{"role": "user", "content": "Hi", "name": None}]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_the_names_that_templates_read(name):
    template = "{{ messages[0].thinking }} {{ messages[0].reasoning_content }} {{ 'thinking' in messages[1] }}"
    messages = [{"role": "assistant", "content": "a", name: "why"}, *USER]
    assert render_chat(template, messages, {}) == "why why False"
    both = [{"role": "assistant", "content": "a", "thinking": "one", "reasoning_content": "two"}, *USER]
    assert render_chat(template, both, {}) == "one two False"


def test_a_chat_in_the_manner_of_gpt_oss():
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "Hello", "thinking": "greet"},
        {"role": "user", "content": "Bye"},
    ]
    # What `header` leaves undefined has its default there.
    assert render_chat(HARMONY, messages, {}) == (
        f"<|start|>system<|message|>You are a tiny model.\nToday: {datetime.now():%Y}\nReasoning: medium<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello<|end|>"
        "<|start|>user<|message|>Bye<|end|>"
        "<|start|>assistant"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", r"unexpected 'end of template' \(TemplateSyntaxError\)"),
        ("{{ raise_exception('roles must alternate') }}", r"failed: roles must alternate \(TemplateError\)"),
        ("{{ messages.append(1) }}", r"SecurityError"),
        ("{{ ''.__class__.__mro__ }}", r"SecurityError"),
        ("{{ messages[0].content + 1 }}", r"TypeError"),
        ("{% for i in range(10000000) %}{% endfor %}", r"OverflowError"),
    ],
)
def test_a_failing_template_gives_one_line(template, message):
    with pytest.raises(MoejaxError, match=message) as caught:
        render_chat(template, USER, {})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("the chat template failed")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["Hi"], r"must be a dict with 'role' and 'content', got 'Hi'"),
        ([{"role": "user", "content": Path("x")}], "must be plain JSON"),
    ],
)
def test_malformed_messages_are_refused(messages, message):
    with pytest.raises(MoejaxError, match=message):
        render_chat("x", messages, {})


def _config(folder: Path, template: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def test_the_template_file_goes_before_the_config(tmp_path):
    _config(tmp_path, "from the config")
    assert find_template(tmp_path) == "from the config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a model that also sees"}')
    assert find_template(tmp_path) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file é", encoding="utf-8")
    assert find_template(tmp_path) == "from the file é"


@pytest.mark.parametrize(
    "templates",
    [{"tool_use": "t", "default": "d"}, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]],
)
def test_of_several_templates_the_default_is_taken(tmp_path, templates):
    _config(tmp_path, templates)
    assert find_template(tmp_path) == "d"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "rag", "template": "r"}], r"has \['rag'\] but no 'default'"),
        (None, "has no chat template; leave --chat out"),
        (3, "has no chat template"),
    ],
)
def test_a_missing_template_is_named(tmp_path, template, message):
    _config(tmp_path, template)
    with pytest.raises(MoejaxError, match=message):
        find_template(tmp_path)


def test_a_template_of_the_processor_is_taken_where_there_is_no_other(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a model that also sees"}')
    assert find_template(tmp_path) == "of a model that also sees"


def test_a_template_file_must_be_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(MoejaxError, match=r"chat_template\.jinja is not UTF-8 text"):
        find_template(tmp_path)
