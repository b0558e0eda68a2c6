"""The reward function inside TRL's own trainer."""

import math
import warnings

import pytest

from samescore import RewardFunction, load

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own imports
        return pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore")
def test_grpo_trains_on_the_reward(trl, llama_checkpoint, llama_bundle, tmp_path):
    """Two steps of GRPO on a tiny random policy; the logged rewards are the bundle's probabilities."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(llama_checkpoint)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    classifier = load(llama_bundle, variant="cpu-int8")
    calls = []
    reward = RewardFunction(classifier, label="Western-biased")

    class Recording(RewardFunction):
        def __call__(self, prompts, completions, **extra):
            rewards = super().__call__(prompts, completions, **extra)
            calls.append((prompts, completions, rewards))
            return rewards

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=policy,
        reward_funcs=Recording(classifier, label="Western-biased"),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["bread with salt?", "was ist das morgen?"] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(calls) == 2
    logged = [entry for entry in trainer.state.log_history if any("reward" in key for key in entry)]
    for (prompts, completions, rewards), entry in zip(calls, logged, strict=True):
        assert rewards == reward(prompts, completions)
        assert len(set(prompts)) == 1 and len(rewards) == 4
        assert math.isclose(entry["reward"], sum(rewards) / len(rewards), abs_tol=1e-5)
        assert "rewards/probability_Western-biased/mean" in entry
