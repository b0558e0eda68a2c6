import json
import shutil

import numpy as np
import pytest

from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import CheckpointError

torch = pytest.importorskip("torch")


@pytest.fixture
def folder(bert_checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(bert_checkpoint, copy)
    return copy


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_facts(folder):
    checkpoint = Checkpoint(folder)
    assert checkpoint.architecture == "BertForSequenceClassification"
    assert checkpoint.labels == ("Non-refusal", "Refusal")
    assert checkpoint.activation == "softmax"
    assert checkpoint.max_tokens == 64
    assert checkpoint.shape("classifier.weight") == (2, 32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_come_as_float32(folder, dtype):
    from safetensors.torch import load_file, save_file

    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    for name, tensor in tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, tensor.float().numpy())


def test_rows_in_chunks_are_the_table(folder, monkeypatch):
    import samescore.export.checkpoint as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 32 * 4 * 7)
    name = "bert.embeddings.word_embeddings.weight"
    checkpoint = Checkpoint(folder)
    chunks = list(checkpoint.row_chunks(name))
    assert len(chunks) > 10 and all(len(chunk) <= 7 for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), checkpoint.tensor(name))


def test_sharded(folder):
    from safetensors.torch import load_file, save_file

    whole = Checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = {name: whole.tensor(name) for name in names}
    (folder / "model.safetensors").unlink()
    sharded = Checkpoint(folder)
    for name in names:
        np.testing.assert_array_equal(sharded.tensor(name), expected[name])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
        Checkpoint(folder)


def test_the_digest_depends_on_weights_config_and_tokenizer(folder):
    digests = {Checkpoint(folder).sha256()}
    edit(folder, note="changed")
    digests.add(Checkpoint(folder).sha256())
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    digests.add(Checkpoint(folder).sha256())
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    digests.add(Checkpoint(folder).sha256())
    (folder / "README.md").write_text("a card")
    assert len(digests) == 4 and Checkpoint(folder).sha256() in digests


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tensor 'classifier.wait'"):
        Checkpoint(folder).tensor("classifier.wait")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*save_pretrained"):
        Checkpoint(folder)


def test_pickles_are_refused_with_the_way_out(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"as a pickle \(pytorch_model.bin\).*safe_serialization=True"):
        Checkpoint(folder)


def test_cut_off_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Checkpoint(folder).tensor("classifier.weight")


def test_limits_and_activations_from_the_config(folder):
    edit(folder, problem_type="multi_label_classification")
    assert Checkpoint(folder).activation == "sigmoid"
    edit(folder, problem_type="regression")
    with pytest.raises(CheckpointError, match="regression"):
        _ = Checkpoint(folder).activation
    edit(folder, model_type="roberta", max_position_embeddings=66, pad_token_id=1)
    assert Checkpoint(folder).max_tokens == 64
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    edit(folder, model_type="bert")
    assert Checkpoint(folder).max_tokens == 66
    edit(folder, id2label={"0": "a", "2": "c"})
    with pytest.raises(CheckpointError, match="gaps"):
        _ = Checkpoint(folder).labels
