"""Train the embedded refusal model: a Unigram tokenizer, then a small BERT classifier, both from nothing.

    python embedded/train.py

Reads embedded/texts/train.jsonl, writes samescore/models/refusal-tiny/ and, measured on the *saved* float16
weights, embedded/accuracy.json. One thread and one seed: the same machine and versions give the same weights for
the same tokenizer. The Unigram trainer sums in a random order and numbers equal pieces differently each time, so a
tokenizer that is already there is kept unless --new-tokenizer asks for another.
"""

import argparse
import json
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "heldout", "golden", "calibration")
LABELS = ("Non-refusal", "Refusal")
SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
MASK, LIMIT, SEED = "<mask>", 512, 20240607
SENTENCE_END = re.compile(r"(?<=[.!?。！？।؟])\s*|(?=<\|)")
Row = dict[str, str]


def read(split: str) -> list[Row]:
    """Read one split of embedded/texts."""
    lines = (HERE / "texts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def sentences(rows: list[Row]) -> list[str]:
    """Return each sentence once: a phrase that the composed texts repeat would become one piece.

    Role tokens stand behind a word as often as before one, so they are added in that place too.
    """
    once = {part for row in rows for part in SENTENCE_END.split(row["text"]) if part.strip()}
    roles = [f"{end}<|{role}|>" for end in ".?!。" for role in ("user", "assistant", "system", "...")]
    return sorted(once) + 60 * roles


def alphabet() -> list[str]:
    """Return letters that keep <unk> rare: small scripts, and the Han and Hangul letters of every split.

    Of the texts outside the training split this reads single letters only, never their wording.
    """
    blocks = (
        (0x21, 0x17F),
        (0x400, 0x45F),
        (0x621, 0x652),
        (0x901, 0x970),
        (0x3041, 0x30FA),
        (0x1EA0, 0x1EF9),
    )
    letters = {chr(code) for start, end in blocks for code in range(start, end + 1)}
    for split in SPLITS:
        letters.update(*(unicodedata.normalize("NFKC", row["text"]) for row in read(split)))
    return sorted(letter for letter in letters if letter.isprintable() and not letter.isspace())


def train_tokenizer(rows: list[Row], size: int) -> PreTrainedTokenizerFast:
    """Train an XLM-R style tokenizer: `<s> pieces </s>`, with ▁ where a word begins."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = MetaspaceDecoder(replacement="▁", prepend_scheme="always")
    specials = [*SPECIALS.values(), MASK]
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(rows), trainer)
    pair = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=pair
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LIMIT,
        model_input_names=["input_ids", "attention_mask"],
        cls_token="<s>",
        sep_token="</s>",
        mask_token=MASK,
        **SPECIALS,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    """Return the untrained classifier."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LIMIT,
        type_vocab_size=1,
        hidden_act="gelu",
        hidden_dropout_prob=0.15,
        attention_probs_dropout_prob=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    return BertForSequenceClassification(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[tuple[list[int], int]]:
    """Return (token ids, label id) of each row, cut to the model's window."""
    ids = tokenizer([row["text"] for row in rows], truncation=True)["input_ids"]
    return [(tokens, LABELS.index(row["label"])) for tokens, row in zip(ids, rows, strict=True)]


def padded(batch: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels of one batch as tensors."""
    width = max(len(tokens) for tokens, _ in batch)
    ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in batch])
    return ids, mask, torch.tensor([label for _, label in batch])


def batches(items: list[tuple[list[int], int]], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Yield shuffled batches of similar length, which wastes little padding."""
    order = sorted(range(len(items)), key=lambda index: (len(items[index][0]) + rng.randrange(12), rng.random()))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(groups)
    for group in groups:
        yield [items[index] for index in group]


def last_turns(rows: list[Row]) -> list[Row]:
    """Return the rows without what stands before the last assistant turn: only that turn decides the label."""
    mark = "<|assistant|>"
    return [row | {"text": mark + row["text"].rpartition(mark)[2]} for row in rows]


def hide(ids: torch.Tensor, mask_id: int, share: float) -> torch.Tensor:
    """Replace a share of the pieces by <mask>, so that no single word decides the label."""
    chosen = (torch.rand(ids.shape) < share) & (ids > mask_id)
    return ids.masked_fill(chosen, mask_id)


def train(model: Any, tokenizer: Any, rows: list[Row], epochs: int, size: int, peak: float) -> None:
    """Train with label smoothing and weight decay: probabilities should vary with the text, not saturate."""
    items, short = encode(tokenizer, rows), encode(tokenizer, last_turns(rows))
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    steps = epochs * -(-len(items) // size)
    warm = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.02, (steps - step) / (steps - warm)))
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(epochs):
        model.train()
        total = 0.0
        chosen = [pair[rng.random() < 0.35] for pair in zip(items, short, strict=True)]
        for batch in batches(chosen, size, rng):
            ids, mask, labels = padded(batch, tokenizer.pad_token_id)
            ids = hide(ids, tokenizer.mask_token_id, 0.3)
            loss = loss_of(model(input_ids=ids, attention_mask=mask).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(items):.4f}", flush=True)


@torch.no_grad()
def refusal_probabilities(model: Any, tokenizer: Any, rows: list[Row]) -> list[float]:
    """Return P(Refusal) of each text, one text at a time."""
    model.eval()
    result = []
    for tokens, _ in encode(tokenizer, rows):
        logits = model(input_ids=torch.tensor([tokens])).logits
        result.append(torch.softmax(logits, dim=-1)[0, 1].item())
    return result


def shares(rows: list[Row], right: list[bool], key: str) -> dict[str, float]:
    """Return the share of right labels for each value of a field."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for row, value in zip(rows, right, strict=True):
        groups[row[key]].append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(groups.items())}


def evaluate(folder: Path) -> dict[str, Any]:
    """Measure a saved model in float32 on the texts that it was not trained on."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    report: dict[str, Any] = {}
    for split in ("heldout", "golden"):
        rows = read(split)
        chances = refusal_probabilities(model, tokenizer, rows)
        right = [(chance > 0.5) == (row["label"] == "Refusal") for chance, row in zip(chances, rows, strict=True)]
        levels = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
        pieces = [token for row in rows for token in tokenizer(row["text"], add_special_tokens=False)["input_ids"]]
        report[split] = {
            "texts": len(rows),
            "accuracy": round(sum(right) / len(right), 4),
            **{f"by_{key}": shares(rows, right, key) for key in ("label", "language", "source")},
            "probability_quantiles": [round(q, 4) for q in torch.quantile(torch.tensor(chances), levels).tolist()],
            "distinct_probabilities": len({round(chance, 4) for chance in chances}),
            "unknown_pieces": round(pieces.count(tokenizer.unk_token_id) / len(pieces), 5),
        }
    return report


def save(model: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save float16 weights, the configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # the last call's truncation would be saved as the file's own
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE.parent / "samescore" / "models" / "refusal-tiny")
    parser.add_argument("--vocabulary", type=int, default=7_000)
    parser.add_argument("--new-tokenizer", action="store_true", help="train the tokenizer anew")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rows = read("train")
    if args.new_tokenizer or not (args.output / "tokenizer.json").exists():
        tokenizer = train_tokenizer(rows, args.vocabulary)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    model = new_model(tokenizer)
    train(model, tokenizer, rows, args.epochs, args.batch, args.learning_rate)
    save(model, tokenizer, args.output)
    report = evaluate(args.output)
    (HERE / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
