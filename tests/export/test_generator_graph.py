"""The graph that generates against PyTorch: every length, chunks, decoding in place, rows of different lengths, formats."""

import json

import numpy as np
import onnx
import pytest

from samescore.calibrate.activations import collect_statistics
from samescore.export.build import MODEL_NAME, build_graph, check_buildable, check_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.graphs.attention import GROUPED_FROM
from samescore.export.language_model import EMBEDDING, HEAD
from samescore.export.recipes import GENERATION_VARIANTS, variant_spec
from samescore.runtime.errors import CheckpointError, UsageError

from ..conftest import tiny_llama_base, tiny_qwen3_5

ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# Largest |logit| difference in float32.
LARGEST = 1e-4
# Mean |logit| difference on random models, whose logits have a standard deviation of about 1.
MEAN = {"cpu-fp32": 5e-6, "cpu-int8": 0.12, "cpu-int4": 0.6, "cuda-fp16": 5e-3}
CAPACITY = 160
MODELS = {
    "llama": lambda folder: tiny_llama_base(folder, max_position_embeddings=2048),
    "llama, its own head": lambda folder: tiny_llama_base(
        folder, max_position_embeddings=2048, tie_word_embeddings=False
    ),
    "qwen3.5, two value heads per key head": tiny_qwen3_5,
    "qwen3.5, as many, multimodal": lambda folder: tiny_qwen3_5(folder, linear_num_value_heads=2, multimodal=True),
    "qwen3.5, its own head": lambda folder: tiny_qwen3_5(folder, tie_word_embeddings=False),
}


class Decoding:
    """A graph run as an engine runs it: caches of a fixed capacity bound in place, the other states in turn."""

    def __init__(self, folder, batch=1, capacity=CAPACITY):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(folder / MODEL_NAME), options, providers=["CPUExecutionProvider"])
        self.lengths = np.zeros(batch, np.int32)
        self.states = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_"):
                shape = [batch, *(size if isinstance(size, int) else capacity for size in value.shape[1:])]
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                # What a cache holds behind its tokens must not matter.
                filler = 7 if value.name.startswith(("past_key", "past_value")) else 0
                self.states[value.name] = np.full(shape, filler, dtype)

    def step(self, ids):
        """Logits float32 [batch, vocabulary] after the next tokens int64 [batch, sequence] of each row."""
        self.lengths = self.lengths + np.int32(ids.shape[1])
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("total_lengths", self.lengths)
        binding.bind_output("logits")
        after = {}
        for name, array in self.states.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            after[name] = array if name.startswith(("past_key", "past_value")) else np.empty_like(array)
            target = ort.OrtValue.ortvalue_from_numpy(after[name])
            assert target.data_ptr() == after[name].ctypes.data  # else nothing here would be in place
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_", "present_", 1), target)
        self.session.run_with_iobinding(binding)
        self.states = after
        return binding.copy_outputs_to_cpu()[0]


def together(one, other):
    """Two texts as the rows of one batch."""
    both = object.__new__(Decoding)
    both.session = one.session
    both.lengths = np.concatenate([one.lengths, other.lengths])
    both.states = {name: np.concatenate([array, other.states[name]]) for name, array in one.states.items()}
    return both


def ids_of(checkpoint, length, seed=0):
    return np.random.default_rng([seed, length]).integers(3, checkpoint.config["vocab_size"], size=(1, length))


def build(checkpoint, folder, name="cpu-fp32", **options):
    folder.mkdir()
    build_graph(checkpoint, variant_spec(name, "generate").recipe, folder, max_tokens=512, **options)
    return folder


def reference_logits(checkpoint, ids):
    """Of every position, float32 [sequence, vocabulary], from the class that the checkpoint names."""
    cls = getattr(transformers, checkpoint.architecture)
    model = cls.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(ids), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    return Generator(Checkpoint(MODELS[request.param](tmp_path_factory.mktemp("generator") / "checkpoint")))


@pytest.fixture(scope="module")
def exact(checkpoint, tmp_path_factory):
    """The float32 graph's folder."""
    return build(checkpoint, tmp_path_factory.mktemp("fp32") / "model")


@pytest.fixture(scope="module")
def text(checkpoint):
    """A text's ids and the reference's logits after each of its tokens."""
    ids = ids_of(checkpoint, 150)
    expected = reference_logits(checkpoint, ids)
    assert expected.std() > 0.3  # else agreement would mean nothing
    return ids, expected


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 63, 64, 65, 127, 128, 130, 150])
def test_prefill_matches_pytorch(exact, text, length):
    ids, expected = text
    logits = Decoding(exact).step(ids[:, :length])
    assert logits.shape == (1, expected.shape[1])
    np.testing.assert_allclose(logits[0], expected[length - 1], atol=LARGEST)


@pytest.mark.parametrize("pieces", [(30, 20), (1, 49), (49, 1), (3, 2, 60, 64)])
def test_prefill_in_chunks(exact, text, pieces):
    ids, expected = text
    decoding, place = Decoding(exact), 0
    for piece in pieces:
        logits = decoding.step(ids[:, place : place + piece])
        place += piece
        np.testing.assert_allclose(logits[0], expected[place - 1], atol=LARGEST)


def test_decoding_in_place(exact, text):
    """Every token one by one, behind a prompt, up to the last place of the cache."""
    ids, expected = text
    decoding = Decoding(exact, capacity=ids.shape[1])
    decoding.step(ids[:, :20])
    for place in range(20, ids.shape[1]):
        logits = decoding.step(ids[:, place : place + 1])
        np.testing.assert_allclose(logits[0], expected[place], atol=LARGEST)


def test_long_texts_read_a_cache_once_for_several_queries(checkpoint, tmp_path):
    """One token at a time, from before the place where that begins."""
    ids = ids_of(checkpoint, GROUPED_FROM + 4)
    expected = reference_logits(checkpoint, ids)
    (tmp_path / "model").mkdir()
    build_graph(checkpoint, variant_spec("cpu-fp32", "generate").recipe, tmp_path / "model", max_tokens=ids.shape[1])
    decoding = Decoding(tmp_path / "model", capacity=ids.shape[1] + 3)
    decoding.step(ids[:, :-8])
    for back in range(8, 0, -1):
        logits = decoding.step(ids[:, -back, None])
        np.testing.assert_allclose(logits[0], expected[-back], atol=LARGEST)
    branches = [node for node in onnx.load(tmp_path / "model" / MODEL_NAME).graph.node if node.op_type == "If"]
    assert branches  # heads of these models share caches


def test_rows_of_different_lengths_decode_together(checkpoint, exact):
    rows = [ids_of(checkpoint, length, seed=4) for length in (41, 12)]
    expected = [reference_logits(checkpoint, ids) for ids in rows]
    prompts = [Decoding(exact), Decoding(exact)]
    for prompt, ids in zip(prompts, rows, strict=True):
        prompt.step(ids[:, :-8])
    batch = together(*prompts)
    for back in range(8, 0, -1):
        logits = batch.step(np.stack([ids[0, -back, None] for ids in rows]))
        for row, reference in zip(logits, expected, strict=True):
            np.testing.assert_allclose(row, reference[-back], atol=LARGEST)


def differences(folder, text):
    """|logit| after a prompt of 64 tokens and each of 16 behind it, from what PyTorch says there."""
    (ids, expected), decoding = text, Decoding(folder)
    logits = [decoding.step(ids[:, :64]), *(decoding.step(ids[:, place : place + 1]) for place in range(64, 80))]
    return np.abs(np.concatenate(logits) - expected[63:80])


@pytest.mark.parametrize("name", MEAN)
def test_variants_match_pytorch(checkpoint, text, tmp_path, name):
    assert differences(build(checkpoint, tmp_path / name, name), text).mean() < MEAN[name]


@pytest.mark.parametrize("name", ["cpu-int8", "cpu-int4"])
def test_calibrated_variants_match_pytorch(checkpoint, text, tmp_path, name):
    run = collect_statistics(checkpoint, [ids_of(checkpoint, length, seed=9)[0] for length in (40, 60, 80)], grams=True)
    assert run.logits.shape == (3, checkpoint.config["vocab_size"])
    folder = build(checkpoint, tmp_path / name, name, statistics=run.statistics)
    assert differences(folder, text).mean() < MEAN[name]


@pytest.mark.parametrize("name", MEAN)
def test_a_tied_table_is_stored_once(checkpoint, tmp_path, name):
    folder = build(checkpoint, tmp_path / name, name)
    size = checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"]
    stored = onnx.load(folder / MODEL_NAME, load_external_data=False).graph.initializer
    large = [table.name for table in stored if np.prod(table.dims, dtype=int) == size]
    assert large == ([EMBEDDING] if checkpoint.head == EMBEDDING else [EMBEDDING, HEAD])


def test_a_width_that_no_block_divides(tmp_path):
    checkpoint = Generator(Checkpoint(tiny_qwen3_5(tmp_path / "checkpoint", intermediate_size=40, hidden_size=72)))
    ids = ids_of(checkpoint, 33)
    logits = Decoding(build(checkpoint, tmp_path / "model", "cpu-int8")).step(ids)
    assert np.abs(logits[0] - reference_logits(checkpoint, ids)[-1]).mean() < MEAN["cpu-int8"]


def test_what_cannot_be_built(bert_checkpoint, tmp_path):
    folder = tiny_llama_base(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"--label-tokens Yes,No\. To generate text with it: --task generate"):
        check_buildable(Checkpoint(folder))
    with pytest.raises(
        UsageError, match="unknown variant 'cpu-int9'; variants are cpu-int8, .*Did you mean 'cpu-int8'"
    ):
        variant_spec("cpu-int9", "generate")
    with pytest.raises(UsageError, match="cannot be exported as migraphx-fp16; its variants are cpu-int8, cpu-fp32"):
        check_variant(Generator(Checkpoint(folder)), variant_spec("migraphx-fp16"))
    document = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        Generator(Checkpoint(folder))


def test_names_are_the_variants():
    assert {spec.name for spec in GENERATION_VARIANTS} == set(MEAN)
