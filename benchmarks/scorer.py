"""Speed and memory of a digit scorer on the CPU: samescore against PyTorch, in one interleaved run.

    python benchmarks/synthesize.py .cache/qwen-0.8b --model qwen-0.8b
    python benchmarks/scorer.py --checkpoint .cache/qwen-0.8b [--lengths 512,2048,8192] [--contenders NAME,…]

A language model of Qwen3.5-0.8B's shape is asked for one of five digits after the last token. As in `llama.py`, whose
processes and rounds these are, every contender is a process of its own, and all are asked in turn. Read times as ratios.

    ours-int8, ours-fp32    samescore's variants cpu-int8 and cpu-fp32; the first is calibrated on random token sequences
    torch-fp32, torch-bf16  transformers, logits of the last position alone; long texts are run once, without warming up

The article stands in the middle of a prompt that is always the same: what comes before it is read once per session, what
comes after it is not. `--articles` measures what that saves: `prefixed` starts from the state after the prompt's beginning.
That state is made outside the timing; `one_by_one` reads everything.

Token ids are random, and so are the weights: the numbers say nothing about accuracy. OpenVINO is not measured, as it has no
route for a head of label tokens here. Prints a table for people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama import Benchmark, Workload, kind, numbers, random_texts, report
from processes import chosen

HERE = Path(__file__).resolve().parent
CONTENDERS = ("ours-int8", "ours-fp32", "torch-fp32", "torch-bf16")
# The published prompt's tokens before and after the article.
BEFORE, AFTER = 30, 58


@dataclass(frozen=True)
class Article(Workload):
    """One prompt, whose first `prefix` tokens are those of every prompt."""

    def modes(self, contender: str) -> tuple[str, ...]:
        """PyTorch is not asked: only we with ourselves are compared."""
        return ("one_by_one", "prefixed") if kind(contender) == "ours" else ()


def workloads(arguments: argparse.Namespace, config: dict[str, Any]) -> list[Workload]:
    """Single texts, and articles in a prompt, by length."""
    found: list[Workload] = []
    for number, length in enumerate(arguments.lengths):
        found.append(Workload(f"1 x {length} tokens", random_texts(config, [length], arguments.seed + number)))
    (prompt,) = random_texts(config, [arguments.before], arguments.seed + 200)
    for number, length in enumerate(arguments.articles):
        (rest,) = random_texts(config, [length + arguments.after], arguments.seed + 300 + number)
        found.append(Article(f"article of {length}", [prompt + rest], arguments.before))
    return found


class ScorerBenchmark(Benchmark):
    """The same processes and rounds with other contenders."""

    name = "scorer"

    def described(self) -> dict[str, Any]:
        """The labels, the prompt, and what reading its beginning once saves."""
        arguments = self.arguments
        return {
            "label_tokens": arguments.label_tokens,
            "prompt": {"before": arguments.before, "after": arguments.after},
            "prefix_saves": self.savings(),
            "not_measured": {"openvino": "no route for a head of label tokens"},
        }

    def savings(self) -> list[dict[str, Any]]:
        """Share of the time that the kept state saves, by contender and article, and how far it moves the logits."""
        rows = {(row.workload, row.contender, row.mode): row for row in self.rows}
        found = []
        for (workload, contender, mode), row in rows.items():
            if mode == "prefixed":
                whole = rows[workload, contender, "one_by_one"]
                share = 1 - float(np.median(row.times) / np.median(whole.times))
                moved = float(np.max(np.abs(np.subtract(row.logits, whole.logits))))
                found.append({"workload": workload, "contender": contender, "share": share, "max_logit_change": moved})
        return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a language model's folder")
    parser.add_argument("--label-tokens", type=lambda text: text.split(","), default=list("01234"))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "scorer", help="where models are kept")
    parser.add_argument("--contenders", type=chosen(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--lengths", type=numbers, default=[512, 2048])
    parser.add_argument("--articles", type=numbers, default=[200, 1000, 8000], help="tokens of the article alone")
    parser.add_argument("--before", type=int, default=BEFORE, help="tokens of the prompt before the article")
    parser.add_argument("--after", type=int, default=AFTER, help="tokens of the prompt after the article")
    parser.add_argument("--torch-wait", choices=("passive", "default"), default="passive", help="OMP_WAIT_POLICY")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print."""
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.scorer import TokenScorer

    arguments = parse()
    arguments.checkpoint, arguments.work = arguments.checkpoint.absolute(), arguments.work.absolute()
    scorer = TokenScorer(Checkpoint(arguments.checkpoint), arguments.label_tokens)
    arguments.label_ids = list(scorer.label_ids)
    benchmark = ScorerBenchmark(arguments, scorer.config, workloads(arguments, scorer.config))
    benchmark.run()
    document = benchmark.document()
    report(document)
    for saving in document["prefix_saves"]:
        print(f"{saving['workload']:<22}{saving['contender']:<15}the prompt's beginning saves {saving['share']:.1%}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
