"""The reference of label tokens: transformers' own language model, at the last position of each text.

    logits = lm_head(hidden state of the last token) [vocabulary]
    score  = logits[label rows]                    label mass = softmax(logits)[label rows].sum()

The label mass is what the model itself gives to the labels as its next token. The score is the softmax over the labels
alone and hides it: near 1 the model answers with a label, near 0 the prompt does not ask for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Below this mean label mass the model would rather say something else: the prompt may be broken.
LOW_MASS = 0.5


def label_scores(model: Any, inputs: Any, label_ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], float]:
    """The label rows of the vocabulary's logits, float32 [labels], and the label mass in [0, 1], of one unpadded text.

    inputs: torch's `input_ids` and `attention_mask`, int64 [1, sequence].
    """
    row = model(**inputs, logits_to_keep=1).logits[0, -1]
    chosen = row[list(label_ids)]
    mass = (chosen.double().logsumexp(0) - row.double().logsumexp(0)).exp()
    return chosen.float().numpy(), min(1.0, float(mass))


def mass_warning(mean: float | None, labels: Sequence[str]) -> str | None:
    """What to tell the user of a mean label mass (None: no label tokens), or None when nothing is strange."""
    if mean is None or mean >= LOW_MASS:
        return None
    return (
        f"the model gives the labels {', '.join(map(repr, labels))} only {mean:.2%} of its next token's probability on average: "
        "its prompt may be broken. Check the template, the label tokens (white space counts) and what follows the text"
    )
