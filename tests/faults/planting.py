"""Plants faults in checkpoints and graph files, and asks for the diagnosis."""

from pathlib import Path

import numpy as np
import onnx

from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.certify import SessionMaker, score_all
from samescore.calibrate.diagnose import Diagnosis
from samescore.calibrate.golden import GoldenSet, GoldenText
from samescore.calibrate.stages import read_model
from samescore.export.build import build_graph, build_variant
from samescore.export.recipes import variant_spec
from samescore.runtime.prefill import Reader


def changed(checkpoint, **changes):
    """The checkpoint with `changes` (dots in tensor names written as __)."""
    copy = type(checkpoint).__new__(type(checkpoint))
    copy.__dict__.update(checkpoint.__dict__)
    by_name = {name.replace("__", "."): change for name, change in changes.items()}
    original = checkpoint.tensor
    copy.tensor = lambda name: (by_name.get(name, lambda x: x)(original(name))).astype(np.float32)
    return copy


def random_texts(vocabulary, count=24, seed=0, longest=40, first=0):
    """Ids of texts that begin with `first`, of many lengths."""
    chance = np.random.default_rng(seed)
    lengths = chance.integers(8, longest, count)
    return [np.concatenate([[first], chance.integers(5, vocabulary, n)]).astype(np.int64) for n in lengths]


def exact_logits(checkpoint, sequences, folder: Path):
    """Logits [texts, labels] of the float32 graph."""
    folder.mkdir(parents=True)
    build_graph(checkpoint, variant_spec("cpu-fp32").recipe, folder)
    return score_all(Reader(SessionMaker(read_model(folder), "cpu")(1)), sequences, workers=1)


def build(checkpoint, variant, folder: Path, sequences):
    """The folder of a variant that was just built."""
    spec = variant_spec(variant)
    statistics = collect_statistics(checkpoint, sequences[:8]).statistics if spec.recipe.smoothing else None
    build_variant(checkpoint, spec, folder, max_tokens=64, statistics=statistics)
    return folder / variant


def diagnosis_of(folder: Path, variant, checkpoint, sequences, reference, *, known=True):
    """What the diagnosis of a built variant says. known: whether it may look at the checkpoint."""
    texts = tuple(GoldenText({"text": ""}, None, ids, row) for ids, row in zip(sequences, reference, strict=True))
    told = Diagnosis(GoldenSet(None, texts), checkpoint.labels, checkpoint.activation, checkpoint if known else None)
    open_session = SessionMaker(read_model(folder), "cpu")
    logits = score_all(Reader(open_session(1)), sequences, workers=1)
    return told.of(logits, open_session, variant_spec(variant).precision)


def after_logits(folder: Path, operator, **attributes):
    """Put one more operator behind the graph's logits."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["logits_before" if name == "logits" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node(operator, ["logits_before"], ["logits"], **attributes))
    onnx.save(model, path)


def edit_weight(folder: Path, name, edit):
    """Change a stored tensor in place: `edit(array)`."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    array = np.memmap(
        folder / where["location"], dtype=dtype, mode="r+", offset=int(where["offset"]), shape=tuple(tensor.dims)
    )
    edit(array)
    array.flush()


def weights_of(folder: Path):
    """Names of the stored tensors."""
    return [t.name for t in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer]


def flip_bit(array, index, bit):
    """Flip one bit of one element."""
    unsigned = array.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(-1)
    unsigned[index] ^= np.asarray(1 << bit, unsigned.dtype)
