"""A causal language model's checkpoint, text-only or multimodal, read as its text model alone."""

from __future__ import annotations

from samescore.export.checkpoint import Checkpoint, Stored

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# How multimodal checkpoints name the tensors of their text model.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")


class LanguageModel(Checkpoint):
    """The text model of a language model's checkpoint.

    model: a whole checkpoint; of a multimodal one its text model is taken. The text model's tensors are named `model.…`
    whatever the checkpoint calls them, the head is `head`. `config` is the text model's.

    Raises CheckpointError where the head is missing.
    """

    def __init__(self, model: Checkpoint):
        self.model = model
        self.folder = model.folder
        self.tokenizer_config = model.tokenizer_config
        self.config = text_config(model)
        self._stored = text_tensors(model.stored())
        # As transformers does: a head that is stored is the head, even if the config calls it tied to the embedding.
        untied = HEAD in self._stored or self.config.get("tie_word_embeddings") is False
        self.head = HEAD if untied else EMBEDDING
        self._where(self.head)

    def sha256(self) -> str:
        """Digest of the checkpoint."""
        return self.model.sha256()


def text_config(model: Checkpoint) -> dict[str, object]:
    """The config of the text model, with the checkpoint's own `architectures`."""
    inner = model.config.get("text_config")
    if not isinstance(inner, dict):
        return dict(model.config)
    outer = {key: model.config[key] for key in ("architectures", "tie_word_embeddings") if key in model.config}
    return {**inner, **outer}


def text_tensors(stored: dict[str, Stored]) -> dict[str, Stored]:
    """Where the text model's tensors lie, named `model.…` and `lm_head.weight`; towers for images and drafts are left out."""
    prefix = next((p for p in TEXT_PREFIXES if any(name.startswith(p) for name in stored)), "model.")
    found = {"model." + name.removeprefix(prefix): place for name, place in stored.items() if name.startswith(prefix)}
    for name in (HEAD, f"language_model.{HEAD}"):
        if name in stored:
            found[HEAD] = stored[name]
    return found
