"""Chat templates as transformers renders them, and contents that cannot become control tokens."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samescore.runtime.chat import MARK, ChatEncoder, ChatTemplate, PromptEncoder, check_messages
from samescore.runtime.errors import BundleError, InputError, MissingDependencyError, UsageError

from ..conftest import train_byte_tokenizer, train_tokenizer

ASSETS = Path(__file__).parents[2] / ".cache" / "assets"

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# In the manner of Qwen3 and Qwen3.5: namespaces, reversed messages, reasoning that is split off, tools, a thinking switch.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.found %}
        {%- set ns.last = index %}
        {%- set ns.found = true %}
    {%- endif %}
{%- endfor %}
{%- if not ns.found %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content|trim %}
    {%- else %}
        {%- set content = message.content|map(attribute='text')|join('') %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {%- generation %}{{- '<|im_end|>\\n' }}{%- endgeneration %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""
CHATS = [
    [{"role": "user", "content": "台灣是什麼?"}],
    [{"role": "system", "content": "Be <b>short</b> & kind."}, {"role": "user", "content": "  Hi\n\n there  "}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "é 🌍\r\n\tx = [1, 2]"},
    ],
]


def smollm2():
    return json.loads((asset("smollm2-base") / "tokenizer_config.json").read_text())["chat_template"]


CASES = {
    "llama3-tokenizer": lambda: LLAMA3,
    "qwen3_5-tokenizer": lambda: QWEN,
    "smollm2-base": smollm2,
}


def asset(name):
    if not (ASSETS / name).exists():
        pytest.skip(f"{name} is not built: run `make assets`")
    return ASSETS / name


@pytest.fixture(scope="module", params=CASES)
def real(request):
    """transformers' tokenizer with its template, and ours with the same."""
    from transformers import AutoTokenizer

    folder, source = asset(request.param), CASES[request.param]()
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = source
    template = ChatTemplate(source, theirs.special_tokens_map)
    return theirs, ChatEncoder(PromptEncoder((folder / "tokenizer.json").read_bytes()), template)


@pytest.mark.real
@pytest.mark.torch
@pytest.mark.parametrize("chat", CHATS)
def test_ids_are_those_of_transformers(real, chat):
    theirs, ours = real
    switches = [None, True, False] if "enable_thinking" in ours.template.variables else [None]
    for thinking in switches:
        given = {} if thinking is None else {"enable_thinking": thinking}
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **given)
        ids, shared = ours.encode(chat, thinking=thinking)
        assert ids.tolist() == expected
        assert theirs.apply_chat_template(chat, return_dict=False)[:shared] == expected[:shared]
        assert 0 < shared <= len(ids)
    if not any(name in ours.template.variables for name in ("enable_thinking",)):
        with pytest.raises(UsageError, match="no thinking switch"):
            ours.encode(chat, thinking=False)


@pytest.mark.real
@pytest.mark.torch
def test_what_users_write_becomes_no_control_token(real):
    theirs, ours = real
    tokenizer = ours.encoder.tokenizer
    control = set(tokenizer.get_added_tokens_decoder())
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:40]

    def controls(ids):
        return [int(i) for i in ids if int(i) in control]

    expected = controls(ours.encode([{"role": "user", "content": "x"}])[0])
    for token in tokens:
        for content in (f"a{token}b", token, token * 3, token[: len(token) // 2] + token + token[len(token) // 2 :]):
            chat = [{"role": "user", "content": content}]
            ids = ours.encode(chat)[0]
            assert controls(ids) == expected
            # The text itself is not changed.
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    train_byte_tokenizer(folder, begin=True)
    return PromptEncoder((folder / "tokenizer.json").read_bytes())


TINY = "{% for m in messages %}{{ '<|begin|>' + m.role + '\n' + m.content + '<|end|>' }}{% endfor %}"


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["<|begin|>", "<|end|>", "<|", "|>", "end", "<", "é", " ", "\n", MARK]), max_size=12)
)
def test_any_mixture_stays_text(tiny, parts):
    content = "".join(parts)
    ids = ChatEncoder(tiny, ChatTemplate(TINY, {})).encode([{"role": "user", "content": content}])[0].tolist()
    assert [i for i in ids if i < 2] == [0, 1]
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False) == f"<|begin|>user\n{content.replace(MARK, '')}<|end|>"


def test_texts_are_read_as_the_tokenizer_reads_them(tiny):
    assert tiny.text("the bread").tolist() == tiny.tokenizer.encode("the bread").ids
    spelled = "<|end|> the bread"
    assert tiny.text(spelled, special_tokens=True).tolist() == tiny.tokenizer.encode(spelled).ids
    assert 1 not in tiny.text(spelled)
    assert tiny.tokenizer.decode(tiny.text(spelled).tolist()) == spelled


def test_a_tokenizer_that_puts_tokens_behind_and_spaces_in_front(tmp_path):
    train_tokenizer(tmp_path)
    encoder = PromptEncoder((tmp_path / "tokenizer.json").read_bytes())
    assert encoder.text("the bread").tolist() == encoder.tokenizer.encode("the bread").ids
    assert encoder.text("the ☃ bread").tolist() == encoder.tokenizer.encode("the ☃ bread").ids
    inside = encoder.text("the </s> bread").tolist()
    assert inside[0] == 0 and inside.count(2) == 1 and inside[-1] == 2


def test_other_values_are_marked_too(tiny):
    encoder = ChatEncoder(tiny, ChatTemplate("{{ messages[0].name }}{{ tools | tojson }}{{ messages[0].content }}", {}))
    message = {"role": "user", "content": "a", "name": "<|end|>"}
    ids, _ = encoder.encode([message], variables={"tools": [{"x<|end|>": "<|begin|>"}]})
    assert not {0, 1} & set(ids.tolist())
    assert tiny.tokenizer.decode(ids.tolist()) == '<|end|>[{"x<|end|>": "<|begin|>"}]a'


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{% for %}", BundleError, "cannot be read"),
        ("{{ raise_exception('no system role') }}", InputError, "no system role"),
        ("{{ messages[0].content + 1 }}", InputError, "cannot render"),
        ("{{ messages[0].nothing.more }}", InputError, "refuses"),
        ("{{ ().__class__.__base__.__subclasses__() }}", InputError, "refuses"),
        ("{{ messages.append(1) }}", InputError, "refuses"),
        ("{% include 'x' %}", InputError, "cannot render|refuses"),
    ],
)
def test_templates_that_fail(source, error, message):
    with pytest.raises(error, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_what_templates_can_call():
    source = "{{ strftime_now('%Y') | length }}{{ [1, '<é>'] | tojson }}"
    source += "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}{{ bos_token }}"
    assert ChatTemplate(source, {"bos_token": "<s>"}).render([]) == '4[1, "<é>"]1<s>'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("Hi", "list of"),
        ({"role": "user", "content": "x"}, "list of"),
        (["Hi"], "message 0 is not an object"),
        ([{"content": "x"}], "message 0 is not an object"),
        ([{"role": "user", "content": "x"}, {"role": "bot", "content": "x"}], "message 1 has role 'bot'"),
        ([{"role": "user", "content": None}], "no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no text"),
    ],
)
def test_messages_of_the_wrong_shape(messages, message):
    with pytest.raises(InputError, match=message):
        check_messages(messages)


def test_values_that_are_no_json(tiny):
    encoder = ChatEncoder(tiny, ChatTemplate(TINY, {}))
    with pytest.raises(InputError, match="JSON values"):
        encoder.encode([{"role": "user", "content": "x", "image": object()}])
    with pytest.raises(InputError, match="surrogate"):
        encoder.encode([{"role": "user", "content": "\udc00"}])


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"samescore\[chat\]"):
        ChatTemplate("", {})
