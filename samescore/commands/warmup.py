"""`samescore warmup`: compile a bundle for the shapes that its texts need, before the first request."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samescore.commands.output import EXIT_OK, print_json
from samescore.runtime.errors import ProviderError, UsageError

# Buckets that are counted when the asked limit does not keep the asked waste.
MANY = 64

if TYPE_CHECKING:
    from samescore.runtime.batches import BucketPlan
    from samescore.runtime.bundle import Bundle
    from samescore.runtime.manifest import Variant
    from samescore.runtime.warmup import Memory


def add(commands: Any) -> None:
    """Describe the arguments."""
    command = commands.add_parser(
        "warmup",
        help="choose and compile the shapes of MIGraphX",
        description="Choose buckets (batch x sequence) from the lengths of texts, compile the bundle for each and remember "
        "them: Classifier(..., provider='migraphx') then starts from the compiled programs.",
    )
    command.add_argument("bundle", metavar="BUNDLE")
    command.add_argument(
        "--provider", metavar="P", default="migraphx", help="migraphx (default), or cpu to try buckets out"
    )
    command.add_argument("--variant", metavar="V", help="a variant's name (default: the provider's first)")
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--buckets", metavar="B", help="these buckets, as in 8x128,1x512, instead of planned ones")
    chosen.add_argument(
        "--lengths", metavar="FILE", help="JSONL texts, or numbers of tokens, to plan for (default: the golden texts)"
    )
    command.add_argument("--limit", metavar="N", type=int, default=8, help="plan at most N buckets (default: 8)")
    command.add_argument(
        "--waste", metavar="W", type=float, default=0.1, help="padding that is worth no further bucket (default: 0.1)"
    )
    command.add_argument("--batch-tokens", metavar="N", type=int, help="padded tokens of one call (default: 8192)")
    command.add_argument(
        "--max-tokens", metavar="N", type=int, help="the longest text to plan for, instead of the bundle's limit"
    )
    command.add_argument("--dry-run", action="store_true", help="print the plan; compile and keep nothing")
    command.add_argument("--json", action="store_true", help="the plan as JSON on stdout")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    from samescore.runtime.bundle import Bundle
    from samescore.runtime.cache import file_digests, plan_path, write_plan
    from samescore.runtime.classifier import check_limit
    from samescore.runtime.padded import open_buckets, require_padding
    from samescore.runtime.threads import available_threads
    from samescore.runtime.warmup import memory_of

    with Bundle(arguments.bundle) as bundle:
        bundle.require_classifier("warmup")
        variant, target = _chosen(bundle, arguments)
        require_padding(variant.inputs)
        check_limit(variant, bundle.manifest.contract.with_max_tokens(arguments.max_tokens).max_tokens)
        plan, source, beyond, needed = _plan(bundle, arguments)
        memory = memory_of(bundle, variant, plan.buckets)
        seconds: dict[str, float] = {}
        if not arguments.json:
            _show(variant, target, plan, source, beyond, memory)
            if needed:
                print(f"          {arguments.waste:.0%} needs at least {needed} buckets: --limit {needed}")
        if not arguments.dry_run:
            files = file_digests(bundle.manifest, variant)
            open_buckets(
                bundle.model(variant),
                target,
                plan.buckets,
                files,
                threads=available_threads(),
                opened=lambda bucket, taken: seconds.update({str(bucket): taken}),
            )
            write_plan(plan_path(target, files), plan.buckets)
    if arguments.json:
        print_json(_document(variant, target, plan, source, beyond, needed, memory, seconds))
    elif not arguments.dry_run:
        print(f"ready     {', '.join(f'{bucket} after {taken:.1f} s' for bucket, taken in seconds.items())}")
    return EXIT_OK


def _chosen(bundle: Bundle, arguments: argparse.Namespace) -> tuple[Variant, str]:
    """The variant and target; a dry run needs no provider, only a variant to plan for."""
    from samescore.runtime.providers import choose, normalize_provider

    asked = normalize_provider(arguments.provider)
    if asked not in ("migraphx", "cpu"):
        raise UsageError(
            f"provider {arguments.provider!r} compiles no shapes: warm up migraphx (or cpu, to try buckets out without a GPU)"
        )
    if not arguments.dry_run:
        return choose(bundle.manifest, provider=asked, variant=arguments.variant)
    target: str = "migraphx" if asked == "migraphx" else "cpu"
    if arguments.variant is not None:
        return bundle.manifest.variant(arguments.variant), target
    for variant in bundle.manifest.variants:
        if variant.target == target:
            return variant, target
    have = ", ".join(variant.name for variant in bundle.manifest.variants)
    raise ProviderError(
        f"this bundle holds no variant for {target}: {have}. Name one of these with --variant to plan for it all the same"
    )


def _plan(bundle: Bundle, arguments: argparse.Namespace) -> tuple[BucketPlan, str, int, int | None]:
    """The plan, where its lengths come from, how many texts are too long, and how many buckets the asked waste needs if more."""
    from samescore.runtime.batches import BATCH_TOKENS, parse_buckets, plan_buckets
    from samescore.runtime.tokenizer import TextEncoder
    from samescore.runtime.warmup import file_lengths, golden_lengths, measure_named

    contract = bundle.manifest.contract.with_max_tokens(arguments.max_tokens)
    if arguments.lengths:
        lengths = file_lengths(Path(arguments.lengths), TextEncoder(bundle.read("tokenizer.json"), contract))
        source = arguments.lengths
    else:
        lengths, source = golden_lengths(bundle), "the golden texts"
    if arguments.buckets:
        plan, beyond = measure_named(parse_buckets(arguments.buckets), lengths)
        return plan, source, beyond, None
    wanted: dict[str, Any] = {
        "longest": contract.max_tokens,
        "waste": arguments.waste,
        "batch_tokens": BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens,
    }
    plan = plan_buckets(lengths, limit=arguments.limit, **wanted)
    more = (plan_buckets(lengths, limit=limit, **wanted) for limit in range(arguments.limit, MANY + 1))
    needed = next((len(found.buckets) for found in more if found.waste <= arguments.waste), None)
    return plan, source, 0, None if plan.waste <= arguments.waste else needed


def _show(variant: Variant, target: str, plan: BucketPlan, source: str, beyond: int, memory: Memory) -> None:
    from samescore.runtime.cache import cache_folder

    print(f"variant   {variant.name} on {target}, {memory.weights / 1e6:.1f} MB")
    print(f"buckets   {', '.join(map(str, plan.buckets))}")
    print(
        f"waste     {plan.waste:.1%} of the padded tokens for many texts like {source}; {plan.waste_at_once:.1%} for these "
        f"{plan.texts} at once, in {plan.calls} calls"
    )
    if beyond:
        print(f"too long  {beyond} texts are longer than {plan.buckets[-1]} and would be refused")
    print(f"memory    up to {memory.most / 1e9:.2f} GB: weights x {memory.buckets} buckets x 2, and activations")
    print(f"cache     {cache_folder() / target}")


def _document(
    variant: Variant,
    target: str,
    plan: BucketPlan,
    source: str,
    beyond: int,
    needed: int | None,
    memory: Memory,
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "variant": variant.name,
        "provider": target,
        "buckets": [str(bucket) for bucket in plan.buckets],
        "lengths": source,
        "texts": plan.texts,
        "texts_too_long": beyond,
        "waste": plan.waste,
        "waste_at_once": plan.waste_at_once,
        "calls": plan.calls,
        "buckets_needed": needed,
        "weight_bytes": memory.weights,
        "memory_bytes": memory.most,
        "seconds": seconds,
    }
