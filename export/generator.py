"""A causal language model with its whole head: it gives a logit to every token of its vocabulary."""

from __future__ import annotations

from samescore.export.language_model import LanguageModel
from samescore.runtime.manifest import Activation


class Generator(LanguageModel):
    """A language model's checkpoint, to be exported as the generator of text that it is.

    It has no labels. `tensor(head)` is float32 [vocabulary, hidden]; where the head is tied to the embedding, `head` names
    the embedding.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """None: the logits are those of the vocabulary."""
        return ()

    @property
    def activation(self) -> Activation:
        """Softmax: one token comes next."""
        return "softmax"
