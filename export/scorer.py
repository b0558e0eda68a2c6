"""A causal language model read as a classifier: what it gives to a few label tokens as the next token of a text.

    softmax(lm_head[label rows] @ hidden state of the last token)

That is the full softmax over the vocabulary, renormalised over the labels; the other rows of the head are never stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from samescore.export.checkpoint import Checkpoint, FloatArray, open_safetensors
from samescore.export.language_model import HEAD, LanguageModel
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import Activation

SCORE = "score.weight"


class TokenScorer(LanguageModel):
    """The classifier that label tokens make of a language model's checkpoint.

    model: a whole checkpoint, text-only or multimodal (its text model is taken). labels: texts that the tokenizer encodes
    as one token each. `tensor("score.weight")` is float32 [labels, hidden], the labels' rows of the head; the text model's
    tensors are named `model.…` whatever the checkpoint calls them. `config` is the text model's.

    Raises UsageError for labels that are not one token each, or fewer than two; CheckpointError where a tensor is missing.
    """

    def __init__(self, model: Checkpoint, labels: Sequence[str]):
        super().__init__(model)
        self._labels = tuple(labels)
        self.label_ids = label_ids(model, self._labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label tokens' texts, in the order of the logits."""
        return self._labels

    @property
    def activation(self) -> Activation:
        """Softmax: the labels are alternatives for one token."""
        return "softmax"

    def names(self) -> list[str]:
        """The text model's tensors and the head."""
        return [*(name for name in self._stored if name != HEAD), SCORE]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name == SCORE:
            return (len(self._labels), super().shape(self.head)[1])
        return super().shape(name)

    def tensor(self, name: str) -> FloatArray:
        """A whole tensor as float32."""
        if name != SCORE:
            return super().tensor(name)
        path, key = self._where(self.head)
        with open_safetensors(path) as file:
            view = file.get_slice(key)
            rows = [np.asarray(view[index : index + 1], dtype=np.float32) for index in self.label_ids]
        return np.concatenate(rows)

    def sha256(self) -> str:
        """Digest of the checkpoint and of the labels: other labels have other logits."""
        labels = "\n".join([self.model.sha256(), *self._labels])
        return hashlib.sha256(labels.encode()).hexdigest()


def label_ids(model: Checkpoint, labels: Sequence[str]) -> tuple[int, ...]:
    """The token of each label; UsageError names the first that is not one token, or is another label's."""
    if len(labels) < 2:
        raise UsageError(f"label tokens must be at least two, got {', '.join(map(repr, labels)) or 'none'}")
    tokenizer = Tokenizer.from_buffer(model.tokenizer_bytes())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found: dict[int, str] = {}
    for label in labels:
        encoding = tokenizer.encode(label, add_special_tokens=False)
        if len(encoding.ids) != 1:
            raise UsageError(
                f"label {label!r} is {len(encoding.ids)} tokens ({' '.join(map(repr, encoding.tokens))}) for this tokenizer; "
                "a label must be one token: name another word for it"
            )
        if encoding.ids[0] in found:
            raise UsageError(f"labels {found[encoding.ids[0]]!r} and {label!r} are the same token")
        found[encoding.ids[0]] = label
    return tuple(found)
