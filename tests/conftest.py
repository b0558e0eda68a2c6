"""Tiny checkpoints of each architecture, with a real (trained) Unigram tokenizer; bundles made from them."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test reads what another one, or the user, has measured; what session fixtures keep goes here.
_CACHE = tempfile.TemporaryDirectory(prefix="samescore-cache-")
os.environ["SAMESCORE_CACHE"] = _CACHE.name

WORDS = """the model refuses to answer because it cannot help with that request and says sorry politely
here is a clear recipe for bread with flour water salt and yeast mix it well then bake it hot
je ne peux pas vous aider avec cette demande mais voici une autre idée bonne journée merci
ich kann dabei leider nicht helfen aber hier ist ein Vorschlag für morgen früh danke sehr
我不能帮助你完成这个请求 但是 这里有一个建议 谢谢 你好 世界
лучше всего испечь хлеб завтра утром спасибо извините я не могу помочь
system user assistant numbers 0 1 2 3 4 5 6 7 8 9 < | > . , ! ? ' "
"""


@pytest.fixture(scope="session", autouse=True)
def few_tokenization_texts() -> Iterator[None]:
    """Exports in tests compare token ids on few strings: the full number takes longer than the tests.

    For the same reason they measure generation only where a test says on how many prompts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samescore.same_tokens.EXPORT_TEXTS", 500)
        patch.setattr("samescore.verifying.VERIFY_TEXTS", 500)
        patch.setattr("samescore.generation_gate.PROMPTS", 0)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of kept logits for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAMESCORE_CACHE", str(folder))
    return folder


def pytest_report_header() -> list[str]:
    from importlib import metadata

    names = ("numpy", "onnxruntime", "tokenizers", "onnx-ir", "torch", "transformers", "peft")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ["samescore with " + ", ".join(found)]


def train_tokenizer(folder: Path, **config: object) -> int:
    """Write an XLM-R style tokenizer (`<s> <pad> </s> <unk> <mask>`, Unigram) into `folder`; its vocabulary size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(WORDS.splitlines() * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


# The split regex of Llama 3 and Qwen3.5, without marks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_tokenizer(folder: Path, *, begin: bool, extra: str = "") -> int:
    """Write a byte-level BPE tokenizer (each digit a token, as in Llama 3 and Qwen) into `folder`; its vocabulary size.

    begin: put `<|begin|>` before every text, as Llama does and Qwen does not.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((WORDS + extra).splitlines() * 3, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return int(tokenizer.get_vocab_size())


def tiny_language_model(folder: Path, *, begin: bool = True, **overrides: object) -> Path:
    """A random `LlamaForCausalLM` of 2 layers that reads long prompts, with a byte-level tokenizer."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from samescore.export.profiles import profile_named

    prompt = profile_named("political-leaning").contract.template
    settings: dict[str, object] = {
        "vocab_size": train_byte_tokenizer(folder, begin=begin, extra=prompt),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        **overrides,
    }
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model whose tokenizer makes each digit one token. Do not change it: copy it."""
    return tiny_language_model(tmp_path_factory.mktemp("language") / "model")


@pytest.fixture(scope="session")
def article_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Golden and calibration articles (JSONL) of many lengths, disjoint; the longest above the tiny model's limit."""
    folder = tmp_path_factory.mktemp("articles")
    words = WORDS.split()
    golden = [" ".join(words[i : i + 1 + 3 * i]) for i in range(24)] + [
        "bread and salt. " * 900,
        "{text}\n\n{0} 我不能",
    ]
    calibration = [" ".join(reversed(words[i : i + 3 + i % 30])) + " calibration" for i in range(8)]
    for name, texts in (("golden", golden), ("calibration", calibration)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "golden.jsonl", folder / "calibration.jsonl"


@pytest.fixture(scope="session")
def scorer_bundle(
    language_model: Path, article_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of the tiny language model at five digits, in the political-leaning prompt. Do not change it: copy it."""
    from samescore import export_bundle

    output = tmp_path_factory.mktemp("bundle") / "scorer"
    golden, calibration = article_files
    export_bundle(
        language_model,
        output,
        profile="political-leaning",
        variants=["cpu-fp32", "cpu-int8"],
        golden=golden,
        calibration=calibration,
        allow_drift=True,  # a random model is no subject for int8
    )
    return output


def plain_graph(folder: Path, widths: dict[str, int], body: Any) -> Path:
    """A graph in the plain recipe: inputs float32 [batch, sequence, width], output `result` of `body(builder, *inputs)`."""
    import onnx_ir as ir

    from samescore.export.build import DATA_NAME, MODEL_NAME
    from samescore.export.graphs.blocks import GraphBuilder
    from samescore.export.recipes import variant_spec
    from samescore.export.weights import WeightFile

    folder.mkdir(parents=True, exist_ok=True)
    weights = WeightFile(folder / DATA_NAME)
    g = GraphBuilder(weights, variant_spec("migraphx-fp16").recipe)
    inputs = [g.input(name, ir.DataType.FLOAT, ["batch", "sequence", width]) for name, width in widths.items()]
    g.output(body(g, *inputs), "result", ir.DataType.FLOAT, ["batch", None, None])
    weights.close()
    ir.save(g.model("plain"), folder / MODEL_NAME)
    return folder / MODEL_NAME


def tiny_bert(folder: Path, **overrides: object) -> Path:
    """A random `BertForSequenceClassification` of 3 layers whose logits vary with the text."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification

    vocabulary = train_tokenizer(folder)
    settings: dict[str, object] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "id2label": {0: "Non-refusal", 1: "Refusal"},
        "label2id": {"Non-refusal": 0, "Refusal": 1},
        **overrides,
    }
    torch.manual_seed(7)
    model = BertForSequenceClassification(BertConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" not in name:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def tiny_llama_base(folder: Path, **overrides: object) -> Path:
    """A random `LlamaForCausalLM` of 2 layers, without a classifier's head."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = train_tokenizer(folder)
    settings: dict[str, object] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        **overrides,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def tiny_adapter(base: Path | str, folder: Path, labels: int = 3, **config: Any) -> Path:
    """A PEFT adapter with random weights (none of them zero) over a base folder, written by PEFT itself."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(11)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, dtype=torch.float32, ignore_mismatched_sizes=True
        )
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **{**settings, **config}))
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data.normal_(0, 0.2)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model, the base of adapters."""
    return tiny_llama_base(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def bert_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT classifier with two labels."""
    return tiny_bert(tmp_path_factory.mktemp("bert") / "checkpoint")


def tiny_llama(folder: Path, **overrides: object) -> Path:
    """A random `LlamaForSequenceClassification` of 3 layers with grouped queries and llama3-scaled RoPE."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    vocabulary = train_tokenizer(folder, model_max_length=2048)
    settings: dict[str, object] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": 2,
        "id2label": {0: "China-biased", 1: "Western-biased"},
        "label2id": {"China-biased": 0, "Western-biased": 1},
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        **overrides,
    }
    torch.manual_seed(7)
    model = LlamaForSequenceClassification(LlamaConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama classifier with two labels."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "checkpoint")


def tiny_qwen3_5(folder: Path, *, multimodal: bool = False, **overrides: object) -> Path:
    """A random Qwen3.5 language model of 4 layers, three of them linear attention with two value heads per key head.

    multimodal: `Qwen3_5ForConditionalGeneration` with a tiny tower for images, as the published checkpoints are.
    """
    torch = pytest.importorskip("torch")
    from transformers import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, Qwen3_5TextConfig

    settings: dict[str, object] = {
        "vocab_size": train_tokenizer(folder, model_max_length=2048),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        **overrides,
    }
    torch.manual_seed(7)
    if multimodal:
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_position_embeddings": 16}
        config = Qwen3_5Config(
            text_config=settings,
            vision_config={**vision, "out_hidden_size": settings["hidden_size"]},
            tie_word_embeddings=settings["tie_word_embeddings"],
        )
        model = Qwen3_5ForConditionalGeneration(config).eval()
    else:
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(0.5, 8).log_()
        elif name.endswith("dt_bias"):
            parameter.data.uniform_(-5, 0.5)
        elif "norm" in name:
            parameter.data.add_(torch.empty_like(parameter).normal_(0, 0.2))
        elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            # What a layer adds is smaller than the residual stream, else rounding errors grow from layer to layer.
            parameter.data.normal_(0, 0.04)
        else:
            parameter.data.normal_(0, 0.4 if "conv1d" in name else 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_5_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 language model, text only."""
    return tiny_qwen3_5(tmp_path_factory.mktemp("qwen3_5") / "checkpoint")


def label_tokens(folder: Path, count: int = 5) -> list[str]:
    """Texts that a checkpoint's tokenizer encodes as one token each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = sorted({token.removeprefix("▁") for token in tokenizer.get_vocab()} - {""})
    alone = [text for text in texts if len(tokenizer.encode(text, add_special_tokens=False).ids) == 1]
    return alone[:: len(alone) // count][:count]


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Golden and calibration `{prompt, response}` texts (JSONL), disjoint."""
    folder = tmp_path_factory.mktemp("pairs")
    words = WORDS.split()
    golden = [(f"{words[i]} bread?", " ".join(words[i : i + 1 + i % 60])) for i in range(40)]
    calibration = [(f"{words[i]} yeast?", " ".join(reversed(words[i : i + 2 + i % 40]))) for i in range(12)]
    for name, pairs in (("golden", golden), ("calibration", calibration)):
        lines = (json.dumps({"prompt": p, "response": r}, ensure_ascii=False) for p, r in pairs)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "golden.jsonl", folder / "calibration.jsonl"


@pytest.fixture(scope="session")
def llama_bundle(
    llama_checkpoint: Path, pair_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of the tiny Llama with its CPU variants, in the prompt-response contract. Do not change it: copy it."""
    from samescore import export_bundle

    output = tmp_path_factory.mktemp("bundle") / "llama"
    golden, calibration = pair_files
    export_bundle(
        llama_checkpoint,
        output,
        profile="realigned",
        variants=["cpu-fp32", "cpu-int8"],
        golden=golden,
        calibration=calibration,
        allow_drift=True,  # a random model is no subject for int8
    )
    return output


@pytest.fixture(scope="session")
def texts_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Golden and calibration texts (JSONL) of many lengths, disjoint."""
    folder = tmp_path_factory.mktemp("texts")
    words = WORDS.split()
    golden = [" ".join(words[i : i + 1 + i % 50]) for i in range(40)]
    golden += [f"<|user|>{words[i]} bread?<|assistant|>{' '.join(words[i : i + i % 9 + 1])}" for i in range(20)]
    calibration = [" ".join(reversed(words[i : i + 3 + i % 30])) + " calibration" for i in range(12)]
    for name, texts in (("golden", golden), ("calibration", calibration)):
        lines = (json.dumps({"text": text, "label": "Refusal"}, ensure_ascii=False) for text in texts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "golden.jsonl", folder / "calibration.jsonl"


@pytest.fixture(scope="session")
def bert_bundle(
    bert_checkpoint: Path, texts_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of the tiny BERT with all its variants, in the conversation contract. Do not change it: copy it."""
    from samescore import export_bundle

    output = tmp_path_factory.mktemp("bundle") / "bert"
    golden, calibration = texts_files
    export_bundle(
        bert_checkpoint,
        output,
        profile="refusal",
        variants=["cpu-int8", "cpu-fp32", "migraphx-fp16"],
        golden=golden,
        calibration=calibration,
    )
    return output
