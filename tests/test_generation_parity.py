"""Generation held against PyTorch: an export's certificate and golden set, verify with and without torch, planted faults."""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from samescore import export_generator, verify
from samescore.calibrate.generation_certify import forced, judge_generation, measure_against_stored
from samescore.calibrate.generation_gate import GENERATION_TOLERANCES
from samescore.calibrate.generation_golden import GOLDEN_GENERATION_NAME, read_generation_golden
from samescore.calibrate.stages import read_model
from samescore.cli import main
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.graphs import rope
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, GateError, UsageError
from samescore.runtime.generation.engine import Engine
from samescore.runtime.session import Session

from .conftest import tiny_language_model, tiny_qwen3_5
from .faults.planting import edit_weight

pytestmark = pytest.mark.torch
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
PROMPTS, CONTEXT = 4, 160


def quiet_report(*_):
    from samescore._progress import silent

    return silent(*_)


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / request.param
    if request.param == "llama":
        tiny_language_model(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        tiny_qwen3_5(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """An exported float32 bundle that passed its gate. Do not change it: copy it."""
    target = tmp_path_factory.mktemp("bundle") / "b"
    export_generator(model, target, variants=["cpu-fp32"], golden_limit=PROMPTS, max_tokens=CONTEXT)
    return target


def golden_of(bundle):
    with Bundle(bundle) as opened:
        return read_generation_golden(opened.read(GOLDEN_GENERATION_NAME)), opened.manifest.generation


def judged(bundle, folder=None, engine=None):
    """The verdict of the bundle's graph (or of one in another folder) against the stored golden set."""
    golden, generation = golden_of(bundle)
    if engine is None:
        session = Session(read_model(folder or bundle / "cpu-fp32"), "cpu", intra_op_threads=1)
        engine = Engine(session, context=generation.context, vocabulary=generation.vocabulary, cache_bytes=0)
    measured = measure_against_stored(golden, engine, "cpu-fp32", quiet_report)
    return judge_generation(measured, "cpu-fp32", "fp32", golden, whole=False)


def test_float32_passes_and_says_on_how_much(bundle, capsys):
    parity = json.loads((bundle / "parity.json").read_text())
    variant = parity["variants"]["cpu-fp32"]
    drift = variant["drift"]
    assert variant["outcome"] == "PASS" and drift["vocabulary"] == "whole"
    assert drift["answers"]["sequences"] == PROMPTS and drift["texts"]["sequences"] == 1
    assert 0 <= drift["answers"]["mean_kld"] < 1e-7 and abs(drift["texts"]["perplexity_ratio"] - 1) < 1e-4
    assert drift["greedy"]["outside"] == 0
    # bfloat16 is coarser by orders of magnitude: the yardstick measures something.
    assert parity["reference"]["bf16_texts_kld"] > 1e3 * drift["texts"]["mean_kld"]
    golden, _ = golden_of(bundle)
    assert len(golden.of("answer")) == PROMPTS and (bundle / GOLDEN_GENERATION_NAME).stat().st_size < 5e6
    assert "same likeliest token" in (bundle / "README.md").read_text()
    assert main(["verify", str(bundle)]) == 0
    said = capsys.readouterr()
    assert "cpu-fp32   answers" in said.out and "PASS" in said.out and "lower bound" in said.err


def test_verify_against_torch_again(bundle, model):
    result = verify(bundle, reference=model)
    assert result.passed and result.note is None
    assert result.certificate.variants["cpu-fp32"].drift.vocabulary == "whole"


def test_the_answers_are_those_of_generate(bundle, model):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, GenerationConfig

    golden, generation = golden_of(bundle)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    eos = list(generation.eos)
    settings = GenerationConfig(do_sample=False, max_new_tokens=CONTEXT // 4, eos_token_id=eos, pad_token_id=eos[0])
    for one in golden.of("answer")[:2]:
        ids = torch.from_numpy(one.prompt[None, :])
        with torch.inference_mode():
            said = reference.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert said[0, len(one.prompt) :].tolist() == one.following.tolist()


def test_swapped_head_rows_fail(bundle, tmp_path):
    folder = shutil.copytree(bundle / "cpu-fp32", tmp_path / "v")
    golden, _ = golden_of(bundle)
    tokens = np.concatenate([one.following for one in golden.sequences])
    common, other = int(np.bincount(tokens).argmax()), int(np.bincount(tokens).argmin())

    def swap(table):
        table[[common, other]] = table[[other, common]]

    names = [t.name for t in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer]
    edit_weight(folder, next(n for n in names if "lm_head" in n or "embed_tokens" in n), swap)
    assert judged(bundle, folder).outcome == "FAIL"


def test_another_rope_table_fails(model, tmp_path, monkeypatch):
    original = rope.inverse_frequencies
    monkeypatch.setattr(rope, "inverse_frequencies", lambda *a, **k: original(*a, **k) * 1.01)
    for module in list(sys.modules.values()):
        if getattr(module, "inverse_frequencies", None) is original:
            monkeypatch.setattr(module, "inverse_frequencies", rope.inverse_frequencies)
    with pytest.raises(GateError, match=r"cpu-fp32: .*KLD on answers .* Nothing was written"):
        export_generator(model, tmp_path / "out" / "b", variants=["cpu-fp32"], golden_limit=PROMPTS, max_tokens=CONTEXT)
    assert not list((tmp_path / "out").iterdir())


class Stale(Engine):
    """Loses the keys that a step of one token writes."""

    def _run(self, state, ids):
        before = {name: value.numpy().copy() for name, value in state.past.items() if name.startswith("past_key")}
        logits = super()._run(state, ids)
        for name, value in before.items():
            if ids.shape[1] == 1 and state.past[name].shape() == list(value.shape):
                state.past[name].update_inplace(value)
        return logits


class Shifted(Engine):
    """Counts one token too many after the prompt."""

    def start(self, ids, **options):
        state = super().start(ids, **options)
        for row in state.tokens:
            row.append(row[-1])
        return state


@pytest.mark.parametrize("broken", [Stale, Shifted])
def test_broken_engines_fail(bundle, broken):
    _, generation = golden_of(bundle)
    session = Session(read_model(bundle / "cpu-fp32"), "cpu", intra_op_threads=1)
    engine = broken(session, context=generation.context, vocabulary=generation.vocabulary, cache_bytes=0)
    verdict = judged(bundle, engine=engine)
    assert verdict.outcome == "FAIL" and verdict.failures


def test_what_drifts_is_kept_only_when_allowed(tmp_path, monkeypatch):
    folder = tiny_language_model(tmp_path / "model")
    # Random models' distributions are so flat that rounding hardly moves them.
    strict = replace(GENERATION_TOLERANCES["int4"], mean_kld=1e-6)
    monkeypatch.setitem(GENERATION_TOLERANCES, "int4", strict)
    options = {"variants": ["cpu-int4"], "golden_limit": 2, "max_tokens": 128}
    with pytest.raises(GateError, match="cpu-int4: mean KLD"):
        export_generator(folder, tmp_path / "out" / "b", **options, budget="none")
    with pytest.raises(GateError, match="no choice of formats stays inside the budget"):
        export_generator(folder, tmp_path / "out" / "b", **options)
    assert not list((tmp_path / "out").iterdir())
    result = export_generator(folder, tmp_path / "b", **options, allow_drift=True)
    assert not result.certificate.passed and "FAILED; mean KLD" in (result.path / "README.md").read_text()
    assert main(["verify", str(result.path)]) == 1


def test_verify_needs_no_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"import samescore; assert samescore.verify({str(bundle)!r}).passed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bundles_without_evidence_and_damaged_ones(bundle, model, tmp_path):
    with pytest.raises(UsageError, match=r"holds no answers of a reference: .*--reference CKPT"):
        verify(bundle, texts="texts.jsonl")
    plain = export_generator(model, tmp_path / "b", variants=["cpu-fp32"], max_tokens=128, golden_limit=0)
    with pytest.raises(UsageError, match="exported without being measured"):
        verify(plain.path)
    raw = (bundle / GOLDEN_GENERATION_NAME).read_bytes()
    lines = gzip.decompress(raw).decode().splitlines()
    document = json.loads(lines[1])
    document["ids"].append(3)
    for broken, said in (
        (b"", "cannot be read"),
        (raw[:-20], "cut off"),
        (gzip.compress("\n".join([lines[0], json.dumps(document)]).encode()), "line 2: .*different lengths"),
    ):
        with pytest.raises(BundleError, match=said):
            read_generation_golden(broken)


def test_forced_logits_are_the_whole_texts(bundle, model):
    """The engine's steps against PyTorch reading everything at once."""
    from samescore.calibrate.generation_reference import GreedyReference

    golden, generation = golden_of(bundle)
    session = Session(read_model(bundle / "cpu-fp32"), "cpu", intra_op_threads=1)
    engine = Engine(session, context=generation.context, vocabulary=generation.vocabulary, cache_bytes=0)
    (text,) = golden.of("text")
    whole = GreedyReference(Generator(Checkpoint(model)), generation.eos).along(text.prompt, text.following)
    assert np.abs(forced(engine, text.prompt, text.following) - whole).max() < 1e-4
