"""The traced route: graphs equal PyTorch at every shape, and anything else is an error that leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from safetensors.numpy import load_file, save_file

from samescore.export import generic
from samescore.runtime.errors import CheckpointError, GateError, MissingDependencyError

pytestmark = pytest.mark.torch

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "DistilBert": {
        "vocab_size": VOCABULARY,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 40,
        "num_labels": 2,
    },
    # Positions are numbered from pad_token_id + 1, so 514 of them are 512 tokens.
    "Roberta": {**SMALL, "max_position_embeddings": 514, "pad_token_id": 1},
    # Embeddings narrower than the layers, and a head of its own.
    "Electra": {**SMALL, "embedding_size": 8, "max_position_embeddings": 40, "num_labels": 1},
}
LONGEST = {"DistilBert": 40, "Roberta": 512, "Electra": 40}
# Fixes its way of attending by the length of its first text.
BIG_BIRD = {**SMALL, "max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 1}


def save_checkpoint(name: str, folder: Path, **settings: Any) -> Path:
    """A random classifier whose logits vary with the text. Nothing tokenizes here."""
    torch.manual_seed(3)
    class_ = getattr(transformers, f"{name}ForSequenceClassification")
    model = class_(class_.config_class(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(name, root / name, **settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def graphs(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, generic.GenericGraph]]:
    """The folder of a model's graph, and what export said of it. Each is traced once."""

    @cache
    def traced(name: str) -> tuple[Path, generic.GenericGraph]:
        output = tmp_path_factory.mktemp(name) / "cpu-fp32"
        return output, generic.export_generic(checkpoints[name], output)

    return traced


@pytest.fixture(scope="module", params=list(SETTINGS))
def exported(request: pytest.FixtureRequest, graphs: Any) -> tuple[str, Path, generic.GenericGraph]:
    """Each model's name, and its graph."""
    return (request.param, *graphs(request.param))


@pytest.fixture(scope="module")
def distilbert(graphs: Any, checkpoints: dict[str, Path]) -> tuple[Path, list[generic.Case]]:
    """A good graph's folder, and cases that it passes."""
    folder, _ = graphs("DistilBert")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints["DistilBert"])
    cases = generic.reference_cases(model.eval(), generic.shape_grid(40))
    assert generic.check_shapes(folder / "model.onnx", cases) < generic.TOLERANCE
    return folder, cases


def test_what_it_says_is_what_lies_there(exported: tuple[str, Path, generic.GenericGraph]) -> None:
    name, folder, graph = exported
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (graph.model_file, graph.data_files) == ("model.onnx", ("model.onnx.data",))
    session = ort.InferenceSession(folder / "model.onnx")
    assert graph.inputs == tuple(value.name for value in session.get_inputs()) == ("input_ids", "attention_mask")
    assert graph.outputs == tuple(value.name for value in session.get_outputs()) == ("logits",)
    assert [value.type for value in session.get_outputs()] == ["tensor(float)"]
    assert graph.opset == ir.load(folder / "model.onnx").opset_imports[""]
    assert graph.checked_tokens == LONGEST[name]
    assert 0 < graph.max_difference < generic.TOLERANCE


def test_both_axes_are_free(exported: tuple[str, Path, generic.GenericGraph]) -> None:
    session = ort.InferenceSession(exported[1] / "model.onnx")
    for value in session.get_inputs():
        assert [isinstance(size, str) for size in value.shape] == [True, True]


def test_it_equals_pytorch_at_shapes_that_were_not_checked(
    exported: tuple[str, Path, generic.GenericGraph], checkpoints: dict[str, Path]
) -> None:
    name, folder, _ = exported
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoints[name]).eval()
    session = ort.InferenceSession(folder / "model.onnx")
    random = np.random.default_rng(11)
    pad = model.config.pad_token_id
    for batch, length in [(1, 3), (4, 9), (2, 38), (5, 1)]:
        ids = random.integers(0, VOCABULARY, (batch, length))
        ids[0, length // 2] = pad
        mask = np.ones_like(ids)
        for row in range(1, batch):
            mask[row, max(1, length - row) :] = 0
        ids[mask == 0] = pad
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.numpy()
        logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
        assert np.ptp(expected[:, 0]) > 1e-3 or batch == 1, "the texts must not all have the same logits"


def test_nothing_of_this_machine_is_in_the_graph(exported: tuple[str, Path, generic.GenericGraph]) -> None:
    graph = (exported[1] / "model.onnx").read_bytes()
    for path in (Path(transformers.__file__).parents[1], Path(__file__).parents[2], Path.home()):
        assert str(path).encode() not in graph
    assert b"site-packages" not in graph


def test_padded_positions_do_not_count(exported: tuple[str, Path, generic.GenericGraph]) -> None:
    session = ort.InferenceSession(exported[1] / "model.onnx")
    ids = np.random.default_rng(5).integers(5, VOCABULARY, (1, 6))
    pad = {"DistilBert": 0, "Roberta": 1, "Electra": 0}[exported[0]]
    padded = np.concatenate([ids, np.full((1, 7), pad)], axis=1)
    mask = (np.arange(13) < 6).astype(np.int64)[None]
    alone = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    np.testing.assert_allclose(
        session.run(["logits"], {"input_ids": padded, "attention_mask": mask})[0], alone, atol=1e-5
    )


@pytest.mark.parametrize(("most", "longest"), [(512, 512), (40, 40), (2, 2), (1, 1), (131_072, 4096)])
def test_the_grid(most: int, longest: int) -> None:
    grid = generic.shape_grid(most)
    lengths = {length for _, length in grid}
    assert {length for length in (1, 2, 17, longest) if length <= longest} == lengths
    assert max(length for length in lengths) == grid[0][1] == longest
    assert {batch for batch, length in grid if length == 1} == {1, generic.BATCH}
    assert len(set(grid)) == len(grid)


def rewrite(folder: Path, change: Callable[[Any], None], destination: Path) -> Path:
    """A copy of the graph in `folder` with its program changed."""
    shutil.copytree(folder, destination)
    program = ir.load(destination / "model.onnx")
    change(program)
    ir.save(program, destination / "model.onnx")
    return destination / "model.onnx"


def add(program: Any, *nodes: Any, output: Any) -> None:
    """Append nodes, the last of which makes the new logits."""
    program.graph.extend(nodes)
    output.dtype, output.shape = ir.DataType.FLOAT, program.graph.outputs[0].shape
    program.graph.outputs[0].name = "logits_before"
    output.name = "logits"
    program.graph.outputs[0] = output


def constant(program: Any, name: str, array: Any) -> Any:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    program.graph.register_initializer(value)
    return value


def bake_logits(program: Any) -> None:
    zero = constant(program, "zero", np.zeros(1, np.float32))
    one = constant(program, "baked", np.full(2, 0.25, np.float32))
    product = ir.node("Mul", [program.graph.outputs[0], zero])
    total = ir.node("Add", [product.outputs[0], one])
    add(program, product, total, output=total.outputs[0])


def bake_length(program: Any) -> None:
    """Right at the 13 tokens that were traced, a little wrong elsewhere."""
    traced = constant(program, "traced_length", np.array([13.0], np.float32))
    scale = constant(program, "scale", np.array([1e-3], np.float32))
    length = ir.node("Shape", [program.graph.inputs[0]], {"start": 1, "end": 2})
    real = ir.node("Cast", [length.outputs[0]], {"to": ir.DataType.FLOAT.value})
    off = ir.node("Sub", [real.outputs[0], traced])
    small = ir.node("Mul", [off.outputs[0], scale])
    total = ir.node("Add", [program.graph.outputs[0], small.outputs[0]])
    add(program, length, real, off, small, total, output=total.outputs[0])


def bake_batch(program: Any) -> None:
    two = constant(program, "two_rows", np.array([2, 2], np.int64))
    reshaped = ir.node("Reshape", [program.graph.outputs[0], two])
    add(program, reshaped, output=reshaped.outputs[0])


def drop_rows(program: Any) -> None:
    first = constant(program, "first", np.array([0], np.int64))
    rows = ir.node("Gather", [program.graph.outputs[0], first], {"axis": 0})
    add(program, rows, output=rows.outputs[0])


def forget_the_mask(program: Any) -> None:
    mask = program.graph.inputs[1]
    equal = ir.node("Equal", [mask, mask])
    ones = ir.node("Cast", [equal.outputs[0]], {"to": ir.DataType.INT64.value})
    ir.convenience.replace_all_uses_with(mask, ones.outputs[0])
    for index in range(2):
        equal.replace_input_with(index, mask)
    program.graph.insert_before(program.graph[0], [equal, ones])


def not_a_number(program: Any) -> None:
    root = ir.node("Log", [constant(program, "minus_one", np.array([-1.0], np.float32))])
    total = ir.node("Add", [program.graph.outputs[0], root.outputs[0]])
    add(program, root, total, output=total.outputs[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (bake_logits, r"differs from PyTorch at batch 1 × 40 tokens: max abs logit difference \d\.\d+e[-+]\d+"),
        (
            bake_length,
            r"differs from PyTorch at batch 1 × 40 tokens: max abs logit difference 2\.70e-02, tolerance 1e-04",
        ),
        (bake_batch, r"cannot run batch 1 × 40 tokens"),
        (drop_rows, r"logits of shape \(1, 2\) at batch 3 × 40 tokens; PyTorch's are \(3, 2\)"),
        (forget_the_mask, r"differs from PyTorch at batch 3 × 40 tokens"),
        (not_a_number, r"max abs logit difference nan"),
    ],
)
def test_a_broken_graph_fails_the_gate(
    change: Callable[[Any], None], said: str, distilbert: tuple[Path, list[generic.Case]], tmp_path: Path
) -> None:
    folder, cases = distilbert
    path = rewrite(folder, change, tmp_path / "broken")
    with pytest.raises(GateError, match=said):
        generic.check_shapes(path, cases)


def test_an_untouched_copy_passes_the_gate(distilbert: tuple[Path, list[generic.Case]], tmp_path: Path) -> None:
    folder, cases = distilbert
    assert generic.check_shapes(rewrite(folder, lambda program: None, tmp_path / "copy"), cases) < generic.TOLERANCE


@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_gate_leaves_nothing(
    exists: bool,
    checkpoints: dict[str, Path],
    distilbert: tuple[Path, list[generic.Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(model: Any) -> Any:
        program = ir.load(distilbert[0] / "model.onnx")
        bake_length(program)
        return program

    monkeypatch.setattr(generic, "_trace", wrong)
    output = tmp_path / "output"
    if exists:
        output.mkdir()
        (output / "kept.txt").write_text("kept")
    with pytest.raises(GateError, match="batch 1 × 40 tokens"):
        generic.export_generic(checkpoints["DistilBert"], output)
    assert [path.name for path in tmp_path.rglob("*")] == (["output", "kept.txt"] if exists else [])


def test_an_invalid_graph_fails_the_gate(
    checkpoints: dict[str, Path],
    distilbert: tuple[Path, list[generic.Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def invalid(model: Any) -> Any:
        program = ir.load(distilbert[0] / "model.onnx")
        program.graph.append(ir.node("NoSuchOperator", [program.graph.outputs[0]]))
        return program

    monkeypatch.setattr(generic, "_trace", invalid)
    monkeypatch.setattr(generic, "_clean", lambda program: None)
    with pytest.raises(GateError, match=r"not valid ONNX.*NoSuchOperator"):
        generic.export_generic(checkpoints["DistilBert"], tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_model_that_attends_by_its_first_length_fails_the_gate(tmp_path: Path) -> None:
    """It is traced short, where it attends fully; its long texts are the ones that tell."""
    folder = save_checkpoint("BigBird", tmp_path / "checkpoint", **BIG_BIRD)
    with pytest.raises(GateError, match="at batch 1 × 64 tokens"):
        generic.export_generic(folder, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_checkpoint_without_its_head_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["DistilBert"], tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights classifier\.bias, classifier\.weight"):
        generic.export_generic(folder, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("architectures", "said"),
    [
        (["DistilBertForMaskedLM"], r"is DistilBertForMaskedLM: only \*ForSequenceClassification"),
        (["DistilBertModel"], "is DistilBertModel"),
        (None, "of no architecture that config.json names"),
        (["HouseStyleForSequenceClassification"], "HouseStyle.*transformers loads DistilBertForSequenceClassification"),
    ],
)
def test_other_architectures_are_refused(
    architectures: list[str] | None, said: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints["DistilBert"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    with pytest.raises(CheckpointError, match=said):
        generic.export_generic(folder, tmp_path / "output")


def test_code_in_the_checkpoint_is_not_run(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["DistilBert"], tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "house_style",
        "architectures": ["HouseForSequenceClassification"],
        "auto_map": {
            "AutoConfig": "house.HouseConfig",
            "AutoModelForSequenceClassification": "house.HouseForSequenceClassification",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "house.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        generic.export_generic(folder, tmp_path / "output")
    assert not (tmp_path / "ran").exists()


def test_a_decoder_without_a_padding_token_is_told_to_name_one(tmp_path: Path) -> None:
    folder = save_checkpoint(
        "Llama", tmp_path / "llama", **SMALL, max_position_embeddings=40, num_key_value_heads=1, pad_token_id=None
    )
    with pytest.raises(CheckpointError, match="Set pad_token_id"):
        generic.export_generic(folder, tmp_path / "output")


def test_a_longer_limit_than_the_positions_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A graph cannot be checked where PyTorch itself has no positions left."""
    folder = save_checkpoint(
        "GPT2", tmp_path / "gpt2", vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    with pytest.raises(
        CheckpointError, match=r"PyTorch itself cannot run GPT2ForSequenceClassification on batch 1 × \d+"
    ):
        generic.export_generic(folder, tmp_path / "output")


def test_nothing_is_printed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: most of the chatter comes once per process."""
    code = (
        "import sys; from pathlib import Path; from samescore.export.generic import export_generic; "
        "export_generic(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(checkpoints["Electra"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize(
    "package", ["torch", "transformers", "transformers.exporters", "onnxscript", "onnx_ir", "onnx"]
)
def test_a_missing_package_names_the_extra(
    package: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'samescore\[calibrate\]'"):
        generic.export_generic(checkpoints["DistilBert"], tmp_path / "output")
