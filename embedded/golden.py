"""Reference numbers of the embedded model, made by PyTorch: `python embedded/golden.py`, after `embedded/train.py`.

Writes `golden.jsonl` (texts, token ids, float32 logits) and `calibration.jsonl` beside the model, so that exporting it
needs no PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from samescore._progress import step
from samescore.calibrate.golden import encode_golden, read_golden, write_golden
from samescore.calibrate.reference import add_reference
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import contract_for, profile_named
from samescore.runtime.tokenizer import TextEncoder

HERE = Path(__file__).parent
MODEL = HERE.parent / "samescore" / "models" / "refusal-tiny"


def main() -> None:
    """Encode, run the reference, write."""
    checkpoint = Checkpoint(MODEL)
    encoder = TextEncoder(checkpoint.tokenizer_bytes(), contract_for(checkpoint, profile_named("refusal-tiny")))
    golden = encode_golden(read_golden(HERE / "texts" / "golden.jsonl"), encoder)
    golden = add_reference(golden, checkpoint, step, yardstick=True)
    (MODEL / "golden.jsonl").write_bytes(write_golden(golden))
    calibration = read_golden(HERE / "texts" / "calibration.jsonl")
    (MODEL / "calibration.jsonl").write_bytes(write_golden(calibration))


if __name__ == "__main__":
    main()
