"""Bundles of tiny random language models of both architectures, with a ChatML template."""

import json

import pytest

from ...conftest import tiny_llama_base, tiny_qwen3_5, train_byte_tokenizer

CHATML = (
    "{%- for message in messages %}{{ '<|begin|>' + message.role + ':' + message.content + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|begin|>assistant:' }}{%- if enable_thinking is defined and not enable_thinking %}"
    "{{ 'no' }}{%- endif %}{%- endif %}"
)
MODELS = {"llama": tiny_llama_base, "qwen3_5": tiny_qwen3_5}


def language_model_of(kind, folder):
    """A model of that kind with a byte-level tokenizer, whose answers end at `<|end|>`, token 1."""
    begin = kind == "llama"
    vocabulary = train_byte_tokenizer(folder / "tokenizer", begin=begin)
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1}
    MODELS[kind](folder, max_position_embeddings=2048, **tokens)
    train_byte_tokenizer(folder, begin=begin)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.8, "top_k": 40}))
    return folder


@pytest.fixture(scope="session", params=MODELS)
def language_checkpoint(request, tmp_path_factory):
    """A checkpoint's folder."""
    pytest.importorskip("torch")
    return language_model_of(request.param, tmp_path_factory.mktemp("generation") / request.param)


@pytest.fixture(scope="session")
def generator_bundle(language_checkpoint, tmp_path_factory):
    """Its bundle, float32, 600 tokens of context."""
    from samescore import export_generator

    output = tmp_path_factory.mktemp("bundle") / "generator"
    export_generator(language_checkpoint, output, variants=["cpu-fp32"], max_tokens=600)
    return output
