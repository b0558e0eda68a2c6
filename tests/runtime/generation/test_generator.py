"""Bundles that write: the same tokens as transformers, states that are reused, batches, and what goes wrong."""

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import samescore
from samescore.runtime import Classifier, Generator
from samescore.runtime.errors import GenerationError, InputError, UsageError
from samescore.runtime.generation.engine import FORGET_TOKENS, Engine

pytest.importorskip("torch")
pytestmark = pytest.mark.torch
# float32 against float32: rounding alone.
LARGEST = 2e-4
PROMPTS = [
    "the model refuses",
    "ich kann dabei leider",
    "我不能帮助你",
    "here is a clear recipe for bread with flour " * 5,
]


@pytest.fixture
def generator(generator_bundle):
    return samescore.load(generator_bundle, threads=1)


@pytest.fixture(scope="session")
def reference(language_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(language_checkpoint, dtype=torch.float32).eval()


def reference_logits(model, ids):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0].numpy()


def random_ids(length, seed=0):
    return np.random.default_rng([length, seed]).integers(5, 250, length)


class Counting:
    """How many tokens an engine really reads."""

    def __init__(self, engine, monkeypatch):
        self.tokens = 0
        run = engine._run

        def counted(state, ids):
            self.tokens += ids.size
            return run(state, ids)

        monkeypatch.setattr(engine, "_run", counted)

    def during(self, call):
        before = self.tokens
        call()
        return self.tokens - before


def test_load_opens_what_the_bundle_is_for(generator_bundle, bert_bundle):
    assert isinstance(samescore.load(bert_bundle), Classifier)
    assert isinstance(samescore.load(generator_bundle), Generator)
    with pytest.raises(UsageError, match="generates text"):
        Classifier(generator_bundle)
    with pytest.raises(UsageError, match="classifier's bundle"):
        Generator(bert_bundle)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(generator, reference, prompt):
    import torch

    ids = generator.encode(prompt)
    completion = generator.generate(prompt, max_tokens=40)
    with torch.inference_mode():
        expected = reference.generate(
            torch.from_numpy(ids)[None], do_sample=False, max_new_tokens=40, eos_token_id=1, pad_token_id=1
        )[0, len(ids) :].tolist()
    tokens = list(completion.token_ids)
    if tokens != expected:  # only where two tokens are as good as equally probable
        place = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
        logits = reference_logits(reference, [*ids, *expected[:place]])[-1]
        assert logits[expected[place]] - logits[tokens[place]] < LARGEST
    assert completion.finish_reason == ("stop" if tokens[-1] == 1 else "length")
    assert (completion.prompt_tokens, completion.completion_tokens) == (len(ids), len(tokens))
    assert completion.text == generator._encoder.tokenizer.decode(tokens, skip_special_tokens=True)


def test_logits_in_chunks_and_steps(generator, reference):
    """A prompt of several chunks, a grown cache, several tokens at a time."""
    ids = random_ids(560)
    expected = reference_logits(reference, ids)
    state = generator.engine.start(ids[:500])
    np.testing.assert_allclose(state.logits[0], expected[499], atol=LARGEST)
    for at in range(500, 520):
        np.testing.assert_allclose(generator.engine.step(state, ids[at : at + 1]), expected[at], atol=LARGEST)
    np.testing.assert_allclose(generator.engine.step(state, ids[520:]), expected[-1], atol=LARGEST)
    assert state.tokens == [ids.tolist()]


def test_a_cache_that_grows_keeps_what_it_held(generator, reference):
    ids = random_ids(280)
    state = generator.engine.start(ids[:250])
    capacity = state.capacity
    for token in ids[250:]:
        logits = generator.engine.step(state, [token])
    assert capacity < 280 <= state.capacity
    np.testing.assert_allclose(logits, reference_logits(reference, ids)[-1], atol=LARGEST)


def test_decoding_copies_no_cache(generator):
    state = generator.engine.start(random_ids(20))
    before = {name: value.data_ptr() for name, value in state.past.items()}
    both = set(before.values()) | {value.data_ptr() for value in state.spare.values()}
    for token in random_ids(6):
        generator.engine.step(state, [token])
        after = {name: value.data_ptr() for name, value in state.past.items()}
        assert all(after[name] == before[name] for name in generator.engine._layout.growing)
        assert set(after.values()) <= both


def test_a_batch_is_each_alone(generator):
    alone = [generator.generate(prompt, max_tokens=n) for n, prompt in zip((12, 30, 30, 30), PROMPTS, strict=True)]
    together = generator.generate(PROMPTS, max_tokens=30)
    shorter = generator.generate(PROMPTS[::-1], max_tokens=30, batch=3)[::-1]
    for one, two, three in zip(alone, together, shorter, strict=True):
        assert one.token_ids == two.token_ids[: len(one.token_ids)]
        assert two == three


def test_rows_of_a_batch_have_their_own_logits(generator, reference):
    rows = [random_ids(n, n) for n in (5, 270, 40)]
    engine = generator.engine
    state = engine.join([engine.start(ids) for ids in rows])
    more = np.array([7, 8, 9])
    for step in range(3):
        logits = engine.step_rows(state, more + step)
    expected = [reference_logits(reference, [*ids, *(m + np.arange(3))])[-1] for ids, m in zip(rows, more, strict=True)]
    np.testing.assert_allclose(logits, expected, atol=LARGEST)
    left = engine.select(state, [2, 0])
    logits = engine.step_rows(left, [11, 12])
    np.testing.assert_allclose(logits[1], reference_logits(reference, [*rows[0], 7, 8, 9, 12])[-1], atol=LARGEST)


def test_the_next_turn_reads_only_what_is_new(generator, reference, monkeypatch):
    counting = Counting(generator.engine, monkeypatch)
    first = random_ids(300)
    assert counting.during(lambda: generator.engine.start(first)) == 300
    assert counting.during(lambda: generator.engine.start(first)) == 0
    turn = np.concatenate([first, random_ids(9, 1)])
    assert counting.during(lambda: generator.engine.start(turn)) == 9
    np.testing.assert_allclose(
        generator.engine.start(turn).logits[0], reference_logits(reference, turn)[-1], atol=LARGEST
    )
    # A state that is handed out is a copy: going on from it leaves the kept one as it was.
    state = generator.engine.start(first)
    generator.engine.step(state, [5, 6, 7])
    np.testing.assert_allclose(
        generator.engine.start(first).logits[0], reference_logits(reference, first)[-1], atol=LARGEST
    )


def test_a_shared_beginning_is_read_once(generator, reference, monkeypatch):
    """A recurrent state serves one place only: the second prompt leaves one where it parted from the first."""
    counting = Counting(generator.engine, monkeypatch)
    system = random_ids(200)
    prompts = [np.concatenate([system, [250 - seed], random_ids(10, seed)]) for seed in range(4)]
    read = [counting.during(lambda ids=ids: generator.engine.start(ids)) for ids in prompts]
    assert read[0] == 211 and read[2:] == [11, 11]
    assert read[1] == (211 if generator.engine._layout.exact else 11)
    np.testing.assert_allclose(
        generator.engine.start(prompts[3]).logits[0], reference_logits(reference, prompts[3])[-1], atol=LARGEST
    )


def test_a_chat_goes_on_where_it_was(generator, monkeypatch):
    messages = [{"role": "user", "content": "the model refuses to answer because it cannot help with that request"}]
    generator.chat(messages, max_tokens=8)
    counting = Counting(generator.engine, monkeypatch)
    messages += [{"role": "assistant", "content": "merci"}, {"role": "user", "content": "and bread?"}]
    shared = generator._chat().encode(messages[:1])[1]
    total = len(generator.encode(messages))
    read = counting.during(lambda: generator.chat(messages, max_tokens=1))
    assert shared > 16
    assert read <= total - shared


def test_no_cache_and_a_small_one(generator_bundle):
    off = Generator(generator_bundle, threads=1, cache_bytes=0)
    off.engine.start(random_ids(50))
    assert len(off.engine.cache) == 0
    small = Generator(generator_bundle, threads=1, cache_bytes=200_000)
    for seed in range(12):
        small.engine.start(random_ids(40, seed))
    assert 0 < small.engine.cache.nbytes <= 200_000
    assert len(small.engine.cache) < 12


def resident_of(name):
    """KiB of mapped files of that name that this process holds in memory."""
    held, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            counts = line.endswith(f"/{name}")
        elif counts and line.startswith("Rss:"):
            held += int(line.split()[1])
    return held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="smaps")
def test_pages_of_the_weights_are_let_go(generator_bundle):
    """They are in memory once, repacked; rows of the embedding come back when they are read."""
    gc.collect()
    before = resident_of("model.onnx.data")  # of generators in other tests
    generator = Generator(generator_bundle, threads=1, cache_bytes=0)
    expected = generator.engine.start(random_ids(20)).logits
    assert resident_of("model.onnx.data") > before
    generator.engine.start(random_ids(FORGET_TOKENS))
    assert resident_of("model.onnx.data") <= before
    np.testing.assert_array_equal(generator.engine.start(random_ids(20)).logits, expected)


def test_pieces_are_the_completion(generator):
    pieces = list(generator.stream(PROMPTS[0], max_tokens=20))
    *before, last = pieces
    assert [piece.finish_reason for piece in before] == [None] * len(before)
    assert "".join(piece.text for piece in pieces) == last.completion.text
    assert sum((piece.token_ids for piece in pieces), ()) == last.completion.token_ids
    assert last.completion == generator.generate(PROMPTS[0], max_tokens=20)


def test_seeds_and_logprobs(generator):
    options = {"temperature": 1.2, "max_tokens": 15, "seed": 3, "logprobs": 2}
    one, two = generator.generate([PROMPTS[0]] * 2, **options)
    assert one == two == generator.generate(PROMPTS[0], **options)
    assert one.token_ids != generator.generate(PROMPTS[0], **{**options, "seed": 4}).token_ids
    assert [entry.token_id for entry in one.logprobs] == list(one.token_ids)
    assert all(entry.logprob <= entry.top[0][1] + 1e-9 and len(entry.top) == 2 for entry in one.logprobs)
    assert generator.sampling().greedy and generator.sampling(temperature=0.5).top_k == 40


def test_stop_strings(generator):
    whole = generator.generate(PROMPTS[1], max_tokens=30)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    stopped = generator.generate(PROMPTS[1], max_tokens=30, stop=[stop, "never said"])
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_the_end_of_the_context(generator):
    word = len(generator.encode("bread bread")) - len(generator.encode("bread"))
    text = "bread" + " bread" * (595 // word - 1)
    room = generator.context - len(generator.encode(text))
    completion = generator.generate(text, max_tokens=500)
    assert 0 < room < 10
    assert completion.completion_tokens == room and completion.finish_reason == "length"
    state = generator.engine.start(random_ids(600))
    with pytest.raises(InputError, match="context is 600"):
        generator.engine.step(state, [5])
    with pytest.raises(InputError, match="601 tokens long"):
        generator.engine.start(random_ids(601))
    for call in (
        generator.generate,
        lambda t: next(generator.stream(t)),
        lambda t: generator.chat([{"role": "user", "content": t}]),
    ):
        with pytest.raises(InputError, match="context of 600"):
            call(text * 2)


def test_cancelling(generator):
    event = threading.Event()
    pieces = []
    for piece in generator.stream(PROMPTS[0], max_tokens=200, cancel=event):
        pieces.append(piece)
        event.set()
    assert len(pieces) == 2 and pieces[-1].finish_reason == "cancelled"
    assert [c.finish_reason for c in generator.generate(PROMPTS, cancel=event)] == ["cancelled"] * 4
    before = generator.generate("flour water salt " * 30, cancel=event)
    assert (before.text, before.token_ids, before.finish_reason) == ("", (), "cancelled")
    stream = generator.stream(PROMPTS[0], max_tokens=200)
    next(stream)
    stream.close()
    assert generator.generate(PROMPTS[0], max_tokens=5).completion_tokens == 5


def test_logits_that_are_no_numbers_spoil_one_answer_only(generator, monkeypatch):
    good = generator.generate(PROMPTS[0], max_tokens=10)
    run = Engine._run

    def broken(self, state, ids):
        logits = run(self, state, ids)
        if state.lengths[0] == good.prompt_tokens + 3:
            logits[:, 5] = np.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_run", broken)
        with pytest.raises(GenerationError, match="not finite"):
            generator.generate(PROMPTS[0], max_tokens=10)
    kept = generator.engine.cache._kept.values()
    assert all(np.isfinite(snapshot.logits).all() for snapshot in kept)
    assert generator.generate(PROMPTS[0], max_tokens=10) == good


def test_threads_do_not_disturb_each_other(generator):
    alone = [generator.generate(prompt, max_tokens=20) for prompt in PROMPTS]
    found = {}

    def work(number):
        found[number] = generator.generate(PROMPTS[number], max_tokens=20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == alone


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: g.generate("x", top_p=2), UsageError, "top_p"),
        (lambda g: g.generate("x", topp=2), UsageError, "unknown sampling option"),
        (lambda g: g.generate(["x", 3]), InputError, "prompt 1: expected a text"),
        (lambda g: g.generate("\ud800"), InputError, "surrogate"),
        (lambda g: g.generate(["x"], batch=0), UsageError, "batch"),
        (lambda g: g.chat([]), InputError, "empty"),
        (lambda g: g.chat("Hi"), InputError, "list of"),
        (lambda g: g.chat([{"role": "judge", "content": "x"}]), InputError, "role 'judge'; roles are system"),
        (lambda g: g.chat([{"role": "user"}]), InputError, "message 0 has no text"),
        (lambda g: g.chat([[{"role": "user", "content": "x"}], []]), InputError, "chat 1: the chat is empty"),
        (lambda g: g.stream("x", thinking=True), UsageError, "for chats"),
        (lambda g: g.engine.start([]), InputError, "empty"),
        (lambda g: g.engine.start([-1]), InputError, "token ids are from 0"),
        (lambda g: g.engine.start([10**6]), InputError, "token ids are from 0"),
    ],
)
def test_what_cannot_be_done_is_said(generator, call, error, message):
    with pytest.raises(error, match=message):
        call(generator)


def test_several_chats_and_thinking(generator):
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    assert generator.chat(chats, max_tokens=5) == [generator.chat(chat, max_tokens=5) for chat in chats]
    usual, quiet = generator.encode(chats[0]), generator._chat().encode(chats[0], thinking=False)[0]
    assert len(quiet) > len(usual)


def test_a_bundle_without_a_template(generator, monkeypatch):
    monkeypatch.setattr(generator, "_template_source", None)
    with pytest.raises(UsageError, match="no chat template"):
        generator.chat([{"role": "user", "content": "Hi"}])
