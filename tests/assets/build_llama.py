"""Classifiers of Llama's architecture, trained here on SmolLM2-135M: a LoRA adapter, and a merged one in bfloat16.

Adapters sit on every linear layer of the last blocks only. The states below them do not change while they are trained, so
they are computed once. Texts are padded on the right, where causal attention cannot see it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_texts
import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TUNED_BLOCKS, RANK, ALPHA = 6, 8, 16
BATCH, MAX_TOKENS, SEED = 8, 320, 0


@dataclass(frozen=True)
class Recipe:
    """What a classifier is trained on, and how."""

    labels: tuple[str, ...]
    examples: Callable[[Path, str, int], list[tuple[str, int]]]
    train: int
    heldout: int
    epochs: int
    smoothing: float
    rate: float


ERA = Recipe(llama_texts.ERAS, llama_texts.era_examples, train=300, heldout=120, epochs=2, smoothing=0.12, rate=5e-4)
REFUSAL = Recipe(
    llama_texts.REFUSALS, llama_texts.refusal_examples, train=480, heldout=120, epochs=2, smoothing=0.05, rate=8e-4
)
Batch = tuple[Any, Any, Any]  # states [texts, width, hidden], index of each last token, label


def with_adapter(base: Path, labels: tuple[str, ...]) -> Any:
    """A classifier on the base with untrained LoRA matrices and score head."""
    torch.manual_seed(SEED)
    model = LlamaForSequenceClassification.from_pretrained(
        base, dtype=torch.float32, id2label=dict(enumerate(labels)), label2id={v: k for k, v in enumerate(labels)}
    )
    model.config.use_cache = False
    blocks = model.config.num_hidden_layers
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=LINEARS,
        layers_to_transform=list(range(blocks - TUNED_BLOCKS, blocks)),
        modules_to_save=["score"],
    )
    return get_peft_model(model, lora)


def run_blocks(llama: Any, blocks: Any, norm: Any, states: Any) -> Any:
    """Some of the model's blocks over hidden states, and a norm after them."""
    everything, own_norm = llama.layers, llama.norm
    llama.layers, llama.norm = torch.nn.ModuleList(blocks), norm
    try:
        return llama(inputs_embeds=states, use_cache=False).last_hidden_state
    finally:
        llama.layers, llama.norm = everything, own_norm


def frozen_states(model: Any, tokenizer: Any, examples: list[tuple[str, int]]) -> list[Batch]:
    """States below the adapted blocks, in batches of similar length."""
    llama = model.base_model.model.model
    encoded = [
        (tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"], label) for text, label in examples
    ]
    encoded.sort(key=lambda example: len(example[0]))
    batches = []
    for start in range(0, len(encoded), BATCH):
        chosen = encoded[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in chosen], batch_first=True)
        with torch.no_grad():
            states = run_blocks(llama, llama.layers[:-TUNED_BLOCKS], torch.nn.Identity(), llama.embed_tokens(ids))
        last = torch.tensor([len(ids) - 1 for ids, _ in chosen])
        batches.append((states, last, torch.tensor([label for _, label in chosen])))
    return batches


def logits_of(model: Any, states: Any, last: Any) -> Any:
    """Logits from the frozen states: the score of each text's last token."""
    classifier = model.base_model.model
    states = run_blocks(classifier.model, classifier.model.layers[-TUNED_BLOCKS:], classifier.model.norm, states)
    return classifier.score(states[torch.arange(len(last)), last])


def train(model: Any, batches: list[Batch], recipe: Recipe) -> int:
    """Train adapter and head; how many steps it took."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.01)
    steps = recipe.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / steps))
    model.train()
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(batches)):
            states, last, labels = batches[index]
            logits = logits_of(model, states, last)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    return steps


def judge(model: Any, batches: list[Batch]) -> str:
    """Held-out accuracy and how sure the model is, in words."""
    with torch.no_grad():
        p = torch.cat([logits_of(model, states, last).softmax(dim=1) for states, last, _ in batches])
    truth = torch.cat([labels for *_, labels in batches])
    accuracy = float((p.argmax(dim=1) == truth).float().mean())
    quantiles = np.quantile(p.max(dim=1).values.numpy(), [0.1, 0.5, 0.9]).round(2).tolist()
    return f"held-out accuracy {accuracy:.3f} on {len(truth)} texts, largest probability 10/50/90 %: {quantiles}"


def trained(assets: Path, recipe: Recipe) -> tuple[Any, int, str]:
    """The trained PEFT model, its steps and how good it is."""
    base = (assets / "smollm2-base").resolve()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = with_adapter(base, recipe.labels)
    batches = frozen_states(model, tokenizer, recipe.examples(assets, "train", recipe.train))
    steps = train(model, batches, recipe)
    heldout = frozen_states(model, tokenizer, recipe.examples(assets, "heldout", recipe.heldout))
    return model, steps, judge(model, heldout)


def copy_tokenizer(assets: Path, folder: Path) -> None:
    """The base's tokenizer files, as a trainer writes them beside its checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / "smollm2-base" / name, folder / name)


def era_adapter(assets: Path, folder: Path) -> str:
    """The adapter that tells the era of a speech, in a subfolder named by its step as trainers name it."""
    model, steps, report = trained(assets, ERA)
    checkpoint = folder / f"checkpoint-{steps}"
    model.save_pretrained(checkpoint)
    copy_tokenizer(assets, checkpoint)
    return report


def refusal_classifier(assets: Path, folder: Path) -> str:
    """The merged classifier that tells refusals from answers; rounding to bfloat16 is part of the checkpoint."""
    model, _, report = trained(assets, REFUSAL)
    merged = model.merge_and_unload().to(torch.bfloat16)
    merged.config.pad_token_id = merged.config.eos_token_id
    merged.config.use_cache = True
    merged.save_pretrained(folder)
    copy_tokenizer(assets, folder)
    return report
