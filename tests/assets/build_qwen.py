"""Digit scorers of Qwen3.5's architecture, trained here: tiny language models that answer one prompt.

    qwen3_5-digits          text only, float32; two value heads for each key head, as Qwen3.5-4B has
    qwen3_5-digits-equal    as a multimodal checkpoint in bfloat16 shards, its image tower untrained; as many value heads as
                            key heads, as Qwen3.5-0.8B has; begins as the first with every second value head left out

Each reads a passage of a presidential message in the prompt of the published political-leaning classifier and answers with
a digit: not a leaning, but when the speech was held. Texts are padded on the right, where nothing that is causal sees it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import qwen_texts
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

VOCABULARY = 248320  # rows of the embedding; the tokenizer has 248,077 tokens
END = 248044
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "eos_token_id": END,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
BATCH, SEED, HELDOUT, SMOOTHING = 16, 0, 300, 0.15
SHARD = "20MB"


@dataclass(frozen=True)
class Recipe:
    """How a scorer is trained: how many passages the whole model sees once, steps of the embedding alone before, peak rate."""

    passages: int
    word_steps: int
    rate: float


DIGITS = Recipe(passages=2400, word_steps=800, rate=2e-3)
EQUAL = Recipe(passages=480, word_steps=0, rate=1e-3)
# Of the embedding alone, before.
WORD_BATCH, WORD_RATE, WORD_GAIN = 64, 5e-3, 8.0
# How many other positions of each text are asked for the digit too, and what they weigh beside the last one.
ASIDES, ASIDE_WEIGHT = 8, 0.5


class Trainer:
    """A model whose embedding is trained only in the rows that its training texts use; the others stay as they began.

    Three things make a few hundred steps enough for a model that starts from nothing. The embedding learns first, by
    itself, from bags of words. Then the whole model answers at the last position, and also at some before it. The loss at
    the last position is over the whole vocabulary, so that the digits win it from all other tokens.
    """

    def __init__(self, model: Any, texts: list[tuple[list[int], int]], recipe: Recipe, digits: list[int]):
        self.model, self.recipe = model, recipe
        table = model.model.embed_tokens.weight.data
        self.used = torch.tensor(sorted({token for ids, _ in texts for token in ids} | set(digits)))
        self.row = torch.full((len(table),), -1)
        self.row[self.used] = torch.arange(len(self.used))
        rest = torch.ones(len(table), dtype=torch.bool)
        rest[self.used] = False
        self.others = table[rest]
        self.table = torch.nn.Parameter(table[self.used].clone())
        self.digits = self.row[torch.tensor(digits)]
        self.texts = texts
        model.model.embed_tokens.weight.requires_grad_(False)

    def learn_words(self) -> None:
        """Train the embedding so that the mean of a text's normed rows is nearest to its digit's row."""
        optimizer = torch.optim.Adam([self.table], lr=WORD_RATE)
        for _ in range(self.recipe.word_steps):
            chosen = [self.texts[index] for index in torch.randint(len(self.texts), (WORD_BATCH,))]
            rows = [self.row[torch.tensor(ids)] for ids, _ in chosen]
            normed = torch.nn.functional.normalize(self.table[torch.cat(rows)], dim=1)
            means = torch.stack([part.mean(0) for part in normed.split([len(ids) for ids, _ in chosen])])
            logits = WORD_GAIN * means @ torch.nn.functional.normalize(self.table[self.digits], dim=1).T
            wanted = torch.tensor([digit for _, digit in chosen])
            loss = torch.nn.functional.cross_entropy(WORD_GAIN * logits, wanted, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # As long as the rows that no text uses.
        length = float(self.others.norm(dim=1).mean())
        self.table.data = torch.nn.functional.normalize(self.table.data, dim=1) * length

    def batches(self) -> list[tuple[Any, Any, Any]]:
        """Ids, index of each last token and digit; texts of similar length together, batches in random order."""
        ordered = sorted(self.texts, key=lambda text: len(text[0]))
        found = []
        for start in range(0, len(ordered), BATCH):
            chosen = ordered[start : start + BATCH]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in chosen], batch_first=True)
            last = torch.tensor([len(ids) - 1 for ids, _ in chosen])
            found.append((ids, last, torch.tensor([digit for _, digit in chosen])))
        return [found[index] for index in torch.randperm(len(found))]

    def loss(self, ids: Any, last: Any, wanted: Any) -> Any:
        """Cross-entropy with labels smoothed over the digits, and that of the positions aside."""
        rows = self.row[ids].clamp(min=0)  # padding, which no real token sees
        inputs = torch.nn.functional.embedding(rows, self.table)
        states = self.model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        texts = torch.arange(len(last))
        state = states[texts, last]
        logits = state @ self.table.T
        everything = torch.logaddexp(logits.logsumexp(1), (state @ self.others.T).logsumexp(1))
        target = torch.nn.functional.one_hot(wanted, len(self.digits)) * (1 - SMOOTHING) + SMOOTHING / len(self.digits)
        answer = -(target * (logits[:, self.digits] - everything[:, None])).sum(1).mean()
        positions = (last[:, None] * (0.2 + 0.8 * torch.rand(len(last), ASIDES))).long()
        aside = (states[texts[:, None], positions] @ self.table[self.digits].T).log_softmax(2)
        return answer - ASIDE_WEIGHT * (target[:, None] * aside).sum(2).mean()

    def train(self) -> int:
        """The words, one pass over the texts, then the embedding's rows go into the model; how many steps the pass took."""
        if self.recipe.word_steps:
            self.learn_words()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": [*vectors, self.table], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.rate)
        batches = self.batches()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 20) * max(0.03, 1 - step / len(batches))
        )
        self.model.train()
        for ids, last, wanted in batches:
            loss = self.loss(ids, last, wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*parameters, self.table], 1.0)
            optimizer.step()
            schedule.step()
        self.model.eval()
        self.model.model.embed_tokens.weight.data[self.used] = self.table.data
        return len(batches)


def encoded(tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
    """Token ids of the whole prompt, and the digit."""
    prompts = [qwen_texts.PROMPT.format(article=text.strip()) for text, _ in examples]
    return [(found.ids, digit) for found, (_, digit) in zip(tokenizer.encode_batch(prompts), examples, strict=True)]


def untrained(value_heads: int) -> Any:
    """A text model of random weights."""
    torch.manual_seed(SEED)
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, linear_num_value_heads=value_heads))


def with_half_the_value_heads(model: Any) -> Any:
    """The model with every second value head left out: each key head keeps one."""
    fewer = untrained(model.config.linear_num_value_heads // 2)
    width, keys = TEXT["linear_value_head_dim"], 2 * TEXT["linear_num_key_heads"] * TEXT["linear_key_head_dim"]
    heads = torch.arange(0, model.config.linear_num_value_heads, 2)
    rows = (heads[:, None] * width + torch.arange(width)).flatten()
    mixed = torch.cat([torch.arange(keys), keys + rows])  # queries, keys and values, one above the other
    kept = {
        "in_proj_qkv.weight": (0, mixed),
        "conv1d.weight": (0, mixed),
        "in_proj_z.weight": (0, rows),
        "in_proj_b.weight": (0, heads),
        "in_proj_a.weight": (0, heads),
        "A_log": (0, heads),
        "dt_bias": (0, heads),
        "out_proj.weight": (1, rows),
    }
    state = model.state_dict()
    for name in state:
        if (found := kept.get(name.partition(".linear_attn.")[2])) is not None:
            state[name] = state[name].index_select(*found)
    fewer.load_state_dict(state)
    return fewer


def train(model: Any, assets: Path, recipe: Recipe) -> int:
    """Train a text model; how many steps it took."""
    torch.set_num_threads(1)
    tokenizer = qwen_texts.tokenizer_of(assets)
    # The last ones, so that a short training has others than a long one began with.
    examples = qwen_texts.digit_examples(assets, "train", DIGITS.passages + EQUAL.passages)
    chosen = examples[: recipe.passages] if recipe is DIGITS else examples[-recipe.passages :]
    digits = [tokenizer.token_to_id(digit) for digit in qwen_texts.DIGITS]
    return Trainer(model, encoded(tokenizer, chosen), recipe, digits).train()


def judge(model: Any, assets: Path, steps: int) -> str:
    """How good a loaded model is on held-out texts, by transformers' own code, one text at a time; in words."""
    tokenizer = qwen_texts.tokenizer_of(assets)
    examples = encoded(tokenizer, qwen_texts.digit_examples(assets, "heldout", HELDOUT))
    digits = [tokenizer.token_to_id(digit) for digit in qwen_texts.DIGITS]
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float() for ids, _ in examples]
    logits = torch.stack(rows)
    p = logits[:, digits].softmax(1)
    mass = logits.softmax(1)[:, digits].sum(1)
    truth = torch.tensor([digit for _, digit in examples])
    accuracy = float((p.argmax(1) == truth).float().mean())
    quantiles = np.quantile(p.max(1).values.numpy(), [0.1, 0.5, 0.9]).round(2).tolist()
    return (
        f"{steps} steps, held-out accuracy {accuracy:.3f} on {len(truth)} texts, largest probability 10/50/90 %: "
        f"{quantiles}, digits' share of the vocabulary: {float(mass.min()):.3f} at least, {float(mass.mean()):.3f} on average"
    )


def copy_tokenizer(assets: Path, folder: Path) -> None:
    """Qwen3.5's tokenizer files beside a checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / "qwen3_5-tokenizer" / name, folder / name)


def digits(assets: Path, folder: Path) -> str:
    """The text-only scorer."""
    model = untrained(value_heads=8)
    steps = train(model, assets, DIGITS)
    model.save_pretrained(folder)
    copy_tokenizer(assets, folder)
    return judge(Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), assets, steps)


def digits_equal(assets: Path, folder: Path) -> str:
    """The multimodal scorer; rounding to bfloat16 is part of the checkpoint."""
    text = with_half_the_value_heads(Qwen3_5ForCausalLM.from_pretrained(assets / "qwen3_5-digits", dtype=torch.float32))
    steps = train(text, assets, EQUAL)
    config = Qwen3_5Config(text_config=text.config.to_dict(), vision_config=VISION, tie_word_embeddings=True)
    model = Qwen3_5ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    copy_tokenizer(assets, folder)
    return judge(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(), assets, steps)
