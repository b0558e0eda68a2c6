"""Tiny checkpoints with massive activations, as trained decoders have them: a few channels of some tokens, far beyond float16.

As in trained models, one token carries them (`MARK`: the first of a text; of BERT's, the last), so that the others keep what
they know. Channel 0 of the residual stream is the same for all tokens, channel 1 is large at the mark alone; neurons that read
them write to the massive channels. What is measured in PyTorch, not assumed, is in `residual_peak`.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MARK = 4
SAME, MARKED, MASSIVE = 0, 1, (2, 3)
# What each kind of outlier makes: the least |x| that PyTorch must see in the residual stream.
LLAMA = {"embedding": 1e4, "down_proj": 7e4, "product": 7e4, "o_proj": 7e4, "scores": 0.0}
QWEN = {"embedding": 1e4, "down_proj": 7e4, "product": 7e4, "out_proj": 7e4}
BERT = {"output": 7e4, "attention": 7e4}


def with_outliers(source: Path, folder: Path, kind: str) -> Path:
    """A copy of a tiny checkpoint with one kind of outlier in its first layer (`scores`: in the last two)."""
    shutil.copytree(source, folder)
    tensors = {name: tensor.contiguous() for name, tensor in load_file(folder / "model.safetensors").items()}
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    {"bert": _bert, "llama": _llama, "qwen3_5_text": _qwen}[model_type](tensors, kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _mark(embedding, mark: float) -> None:
    """Channel 0 is 1 everywhere, channel 1 is `mark` at the mark, and the massive channels are empty."""
    embedding[:, [SAME, MARKED, *MASSIVE]] = 0
    embedding[:, SAME] = 1
    embedding[MARK, MARKED] = mark


def _only(weight, rows, column: int, values) -> None:
    """These rows of a Linear read one column alone."""
    weight[rows] = 0
    weight[rows, column] = torch.as_tensor(values, dtype=weight.dtype)


def _feed_forward(tensors, mlp: str, inner: float, massive: float) -> None:
    """At the mark, about: two neurons hold `inner`, the massive channels `massive`. The normed mark is about 8."""
    root = (inner**0.5) / 8
    _only(tensors[f"{mlp}.gate_proj.weight"], [0, 1], MARKED, [root, root])
    _only(tensors[f"{mlp}.up_proj.weight"], [0, 1], MARKED, [root, -root])
    for channel, neuron in zip(MASSIVE, (0, 1), strict=True):
        _only(tensors[f"{mlp}.down_proj.weight"], channel, neuron, massive / inner)


def _decoder(tensors, kind: str) -> None:
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensor[[SAME, MARKED, *MASSIVE]] = 0
    # Where every token is to be massive, the mark is one like others.
    _mark(tensors["model.embed_tokens.weight"], 0 if kind == "o_proj" else 30)
    if kind == "embedding":
        tensors["model.embed_tokens.weight"][MARK, MASSIVE[0]] = 6e4
    if kind == "down_proj":
        _feed_forward(tensors, "model.layers.0.mlp", inner=4e3, massive=1.5e5)
    if kind == "product":
        _feed_forward(tensors, "model.layers.0.mlp", inner=2e5, massive=1.5e5)


def _llama(tensors, kind: str) -> None:
    _decoder(tensors, kind)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[SAME, MARKED]] = 1
    # Random models have no margin: half the logits, for gates that are made for trained ones.
    tensors["score.weight"] /= 2
    if kind == "o_proj":
        # Every token's values hold the same number, so that every token's context does, and all are massive alike.
        _only(tensors["model.layers.0.self_attn.v_proj.weight"], 0, SAME, 30.0)
        out = tensors["model.layers.0.self_attn.o_proj.weight"]
        out[:, [0, 16]] = 0  # the two heads that read this number
        _only(out, MASSIVE[0], 0, 700.0)
        _quiet_massive(tensors, 1.5e4)
    if kind == "scores":
        # Large keys at the mark; every query sees the same multiple of them, so that softmax does not notice.
        for layer in (1, 2):
            attention = f"model.layers.{layer}.self_attn"
            _only(tensors[f"{attention}.k_proj.weight"], [7, 15], MARKED, [80.0, 80.0])
            _only(tensors[f"{attention}.q_proj.weight"], [7, 15], SAME, [80.0, 80.0])


def _quiet_massive(tensors, size: float) -> None:
    """Norms behind the first attention give the ordinary channels back what the massive one takes."""
    for name, tensor in tensors.items():
        if name.endswith("norm.weight") and not name.endswith("layers.0.input_layernorm.weight"):
            tensor *= size
            tensor[MASSIVE[0]] = 0.1


def _qwen(tensors, kind: str) -> None:
    _decoder(tensors, kind)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[SAME, MARKED]] = 0
    tensors["model.norm.weight"].add_(1).div_(2).sub_(1)
    if kind == "out_proj":
        attention = "model.layers.0.linear_attn"
        rows = list(range(32))
        _only(tensors[f"{attention}.in_proj_z.weight"], rows, MARKED, [100.0] * 32)
        tensors[f"{attention}.out_proj.weight"][MASSIVE[0]] = 0
        tensors[f"{attention}.out_proj.weight"][MASSIVE[0], rows] = 30.0 * torch.sign(torch.randn(32))


def _bert(tensors, kind: str) -> None:
    _mark(tensors["bert.embeddings.word_embeddings.weight"], 30)
    for name in ("position_embeddings", "token_type_embeddings"):
        tensors[f"bert.embeddings.{name}.weight"][:, [SAME, MARKED, *MASSIVE]] = 0
    layer = "bert.encoder.layer.0"
    if kind == "output":
        _only(tensors[f"{layer}.intermediate.dense.weight"], 0, MARKED, 20.0)
        _only(tensors[f"{layer}.output.dense.weight"], MASSIVE[0], 0, 1500.0)
        tensors[f"{layer}.intermediate.dense.bias"][0] = 0
    if kind == "attention":
        # The mark's values are large, and it attends to itself: its key and its query are large too.
        attention = f"{layer}.attention"
        for part, size in (("query", 2.0), ("key", 2.0), ("value", 50.0)):
            _only(tensors[f"{attention}.self.{part}.weight"], 0, MARKED, size)
            tensors[f"{attention}.self.{part}.bias"][0] = 0
        _only(tensors[f"{attention}.output.dense.weight"], MASSIVE[0], 0, 500.0)


def residual_peak(model, sequences) -> float:
    """The largest |x| in the residual stream of a PyTorch model: what enters its norms (of BERT, what their sum is)."""
    peaks = [0.0]

    def look(_, inputs):
        peaks.append(float(inputs[0].abs().max()))

    norms = [m for name, m in model.named_modules() if name.endswith(("layernorm", "LayerNorm", "model.norm"))]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.inference_mode():
        for ids in sequences:
            model(torch.from_numpy(ids[None]))
    for handle in handles:
        handle.remove()
    return max(peaks)
