"""A bundle's bytes: what is damaged, swapped or not a real file is refused by name."""

import json
import os
import shutil

import pytest

from samescore.runtime import Bundle, BundleError, load

DATA = "cpu-int8/model.onnx.data"


@pytest.fixture
def bundle(bert_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bert_bundle, copy)
    return copy


def test_a_whole_bundle_passes(bundle):
    with Bundle(bundle) as opened:
        assert opened.verify_files() == sum(entry.size for entry in opened.manifest.files.values())
        assert len(opened.digest) == 64
        assert set(opened.manifest.files) == {
            path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
        } - {"bundle.json"}


def test_there_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle at .*nowhere.*samescore export SOURCE -o"):
        Bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        Bundle(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is a file; a bundle is a folder"):
        Bundle(tmp_path / "file")


@pytest.mark.parametrize("name", ["tokenizer.json", "cpu-int8/model.onnx", DATA])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_refused(bundle, name, bit):
    path = bundle / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1 << bit
    path.write_bytes(raw)
    with pytest.raises(BundleError, match=f"{name} is damaged: its SHA-256"):
        load(bundle, variant="cpu-int8")


@pytest.mark.parametrize("keep", [0, 1, 4096])
def test_a_cut_off_file_is_refused(bundle, keep):
    os.truncate(bundle / DATA, keep)
    with pytest.raises(BundleError, match=r"holds \d+ bytes, the manifest says"):
        load(bundle, variant="cpu-int8")


def test_a_missing_file_is_named(bundle):
    (bundle / DATA).unlink()
    with pytest.raises(BundleError, match=f"{DATA} is missing"):
        load(bundle, variant="cpu-int8")


def test_a_symlinked_file_is_refused(bundle, tmp_path):
    (bundle / DATA).rename(tmp_path / "elsewhere")
    (bundle / DATA).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"{DATA} is a symbolic link"):
        load(bundle, variant="cpu-int8")


def test_a_symlinked_folder_is_refused(bundle, tmp_path):
    (bundle / "cpu-int8").rename(tmp_path / "elsewhere")
    (bundle / "cpu-int8").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a symbolic link"):
        load(bundle, variant="cpu-int8")


def test_a_symlinked_manifest_is_refused(bundle, tmp_path):
    (bundle / "bundle.json").rename(tmp_path / "bundle.json")
    (bundle / "bundle.json").symlink_to(tmp_path / "bundle.json")
    with pytest.raises(BundleError, match="is a symbolic link"):
        Bundle(bundle)


def test_a_hard_linked_file_is_refused(bundle, tmp_path):
    os.link(bundle / DATA, tmp_path / "twin")
    with pytest.raises(BundleError, match=f"{DATA} has hard links"):
        load(bundle, variant="cpu-int8")


def test_a_fifo_does_not_hang(bundle):
    (bundle / DATA).unlink()
    os.mkfifo(bundle / DATA)
    with pytest.raises(BundleError, match="is not a regular file"):
        load(bundle, variant="cpu-int8")


def test_a_folder_reached_through_a_link_is_fine(bundle, tmp_path):
    (tmp_path / "current").symlink_to(bundle)
    assert load(tmp_path / "current").labels == ("Non-refusal", "Refusal")


def test_the_bytes_that_were_hashed_are_the_bytes_that_run(bundle, monkeypatch):
    """Swap the weights after the check: the session must still be built from the old ones."""
    import samescore.runtime.classifier as module

    text = "<|user|>bread<|assistant|>the model refuses"
    expected = load(bundle, variant="cpu-int8")(text).logits
    original = module.Session

    def swap_then_build(*arguments, **options):
        replacement = bundle / "replacement"
        replacement.write_bytes(os.urandom((bundle / DATA).stat().st_size))
        replacement.replace(bundle / DATA)
        return original(*arguments, **options)

    monkeypatch.setattr(module, "Session", swap_then_build)
    assert load(bundle, variant="cpu-int8")(text).logits == expected


def test_a_graph_that_onnx_runtime_rejects_is_a_bundle_error(bundle):
    import hashlib

    raw = b"not a graph"
    (bundle / "cpu-int8/model.onnx").write_bytes(raw)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"]["cpu-int8/model.onnx"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="cannot load this graph on cpu"):
        load(bundle, variant="cpu-int8")
