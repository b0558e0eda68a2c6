"""The check that a bundle's token ids are the Hugging Face tokenizer's, as export and verify run it."""

from __future__ import annotations

from collections.abc import Sequence

from samescore.calibrate.reference import Reporter
from samescore.calibrate.token_faults import TokenizationEquality
from samescore.calibrate.tokenization import BATCH, check_tokenization
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import GateError, UsageError
from samescore.runtime.tokenizer import TextEncoder

# Strings compared if nothing else is asked for: when a bundle is made, and when it is verified.
EXPORT_TEXTS, VERIFY_TEXTS = 100_000, 10_000


def tokenization_equality(
    checkpoint: Checkpoint, encoder: TextEncoder, texts: Sequence[str], count: int | None, report: Reporter
) -> TokenizationEquality | None:
    """The comparison on `count` strings (None: EXPORT_TEXTS; 0: no comparison, None)."""
    wanted = EXPORT_TEXTS if count is None else count
    if wanted < 0:
        raise UsageError(f"--tokenization-texts must be at least 0, got {wanted}")
    if wanted == 0:
        return None
    with report(f"comparing token ids with transformers on up to {wanted} strings", -(-wanted // BATCH)) as tick:
        return check_tokenization(checkpoint, encoder, texts, wanted, progress=tick)


def refuse_difference(found: TokenizationEquality | None, checkpoint: Checkpoint) -> None:
    """GateError that names the likely cause and the first string with other ids, with both lists."""
    if found is not None and found.different:
        raise GateError(
            f"{found.different} of {found.texts} strings have other token ids than transformers' tokenizer of "
            f"{checkpoint.folder} makes. diagnosis: {found.first_difference}. Nothing was written. Save the tokenizer that "
            "you use (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)) beside the checkpoint and export again, or "
            "--allow-drift"
        )
