"""A bundle as a reward function for reinforcement learning: `f(prompts, completions, **kw) -> list[float]`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from samescore.runtime.classifier import Classifier
from samescore.runtime.errors import InputError, UsageError, did_you_mean
from samescore.runtime.prediction import Prediction

Kind = Literal["probability", "log_odds"]
Turns = str | Sequence[Mapping[str, Any]]


class RewardFunction:
    """The reward that TRL's trainers call (`reward_funcs=`), and any other code with lists of prompts and completions.

    bundle: a Classifier, or the path of a bundle (then `options` are those of Classifier). label: whose score is the
    reward. kind: `probability` in [0, 1], or `log_odds`, which does not saturate. empty: the reward of a blank
    completion, which has nothing to score. Raises UsageError for a label that the bundle does not have or a bundle that
    does not read a prompt and a response.
    """

    def __init__(
        self,
        bundle: Classifier | str | os.PathLike[str],
        *,
        label: str,
        kind: Kind = "probability",
        empty: float = 0.0,
        **options: Any,
    ):
        self.classifier = bundle if isinstance(bundle, Classifier) else Classifier(bundle, **options)
        manifest = self.classifier.manifest
        if manifest.contract.kind != "prompt-response":
            raise UsageError(
                f"this bundle reads a {manifest.contract.kind}; a reward needs one that reads a prompt and a response"
            )
        if label not in manifest.labels:
            raise UsageError(
                f"this bundle has no label {label!r}; it has: {', '.join(manifest.labels)}."
                f"{did_you_mean(label, manifest.labels)}"
            )
        if kind not in ("probability", "log_odds"):
            raise UsageError(f"kind is 'probability' or 'log_odds', got {kind!r}")
        self.label = label
        self.kind: Kind = kind
        self.empty = empty
        # Trainers log a reward under this name.
        self.__name__ = f"{kind}_{label}"

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns], **_: Any) -> list[float]:
        """One float per completion, in order. Completions of the same prompt share its computation.

        A prompt or completion is a string, or a list of `{role, content}`: then the last user message and the text of the
        assistant's messages are what is scored. InputError names the pair that cannot be scored.
        """
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts, but {len(completions)} completions")
        groups: dict[str, list[int]] = {}
        responses = [_text_of(completion, "assistant", number) for number, completion in enumerate(completions)]
        for number, prompt in enumerate(prompts):
            if responses[number].strip():
                groups.setdefault(_text_of(prompt, "user", number), []).append(number)
        rewards = [self.empty] * len(completions)
        for numbers, scored in self._score(groups, responses):
            for number, prediction in zip(numbers, scored, strict=True):
                rewards[number] = self._reward(prediction)
        return rewards

    def _score(
        self, groups: Mapping[str, list[int]], responses: Sequence[str]
    ) -> Iterator[tuple[list[int], list[Prediction]]]:
        """Each group's numbers and predictions; completions that are alone with their prompt are scored together."""
        alone = {numbers[0]: prompt for prompt, numbers in groups.items() if len(numbers) == 1}
        pairs = [{"prompt": prompt, "response": responses[number]} for number, prompt in alone.items()]
        yield list(alone), self.classifier.score(pairs)
        for prompt, numbers in groups.items():
            if len(numbers) > 1:
                yield numbers, self.classifier.score(prompt, [responses[number] for number in numbers])

    def _reward(self, prediction: Prediction) -> float:
        if self.kind == "log_odds":
            return prediction.log_odds(self.label)
        return prediction.probabilities[self.label]


def _text_of(turns: Turns, role: str, number: int) -> str:
    """A string as it is; of messages, the last of the user or all of the assistant."""
    if isinstance(turns, str):
        return turns
    contents = [
        message.get("content") for message in turns if isinstance(message, Mapping) and message.get("role") == role
    ]
    texts = [content for content in contents if isinstance(content, str)]
    if not contents or len(texts) != len(contents):
        raise InputError(f"pair {number}: expected a string, or messages of which the {role}'s hold text")
    return texts[-1] if role == "user" else "\n".join(texts)
