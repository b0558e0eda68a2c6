"""A trained chat model (SmolLM2-135M-Instruct, from `make assets`) answers as transformers does."""

from pathlib import Path

import pytest

from samescore import export_generator, load

ASSETS = Path(__file__).parent.parent.parent / ".cache" / "assets"
QUESTIONS = ["What is the capital of France?", "Write one sentence about bread.", "台灣是什麼?"]

pytestmark = [pytest.mark.real, pytest.mark.torch, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint():
    if not (ASSETS / "smollm2-base").exists():
        pytest.skip("smollm2-base is not built: run `make assets`")
    return ASSETS / "smollm2-base"


def test_chats_are_those_of_transformers(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_generator(checkpoint, tmp_path / "bundle", variants=["cpu-fp32"], max_tokens=1024)
    generator = load(tmp_path / "bundle")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = generator.chat(chats, max_tokens=32)
    assert "Paris" in answers[0].text
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for chat, answer in zip(chats, answers, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
        assert ids[0].tolist() == generator.encode(chat).tolist()
        with torch.inference_mode():
            expected = model.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :].tolist()
        assert list(answer.token_ids) == expected
        assert generator.chat(chat, max_tokens=32) == answer
        assert "".join(piece.text for piece in generator.stream(chat, max_tokens=32)) == answer.text
