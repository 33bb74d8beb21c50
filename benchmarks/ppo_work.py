"""The shared setup of `benchmarks/ppo_run.py`: a model, questions, and a reward for both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import harness
from tasks.align import rewards
from tasks.align import stage as align
from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.generation import sampling
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.text.chat import Question

PROFILE = harness.ROOT / "profiles" / "default.yaml"
REQUIRED_PATHS = tuple(
    harness.ROOT / "data" / path for path in ("finetune/chat/model", "validate/instructions", "reward/train/model")
)  # of the chain
END_ID, PAD_ID, PROMPT_TOKENS = 1, 0, 12


@dataclass(frozen=True)
class Setup:
    """The shared setup of all sides: model, questions, reward, and hyperparameters."""

    folder: Path  # of the model
    tokenizer: Any
    questions: list[Question]
    reward_fn: Any  # our reward function
    trl_reward_model: Any  # the same as a module for TRL
    minibatch: int
    epochs: int
    max_reply_tokens: int
    kl: float
    vf_clip_range: float
    missing_eos_penalty: float


def fresh_setup(request: dict[str, Any], folder: Path) -> Setup:
    """Return a setup with a fresh model, whose replies have no end token; the reward is another fresh model's score."""
    shape = request["shape"]
    make_model(shape, "causal", 4).save_pretrained(folder)
    tokenizer, scorer = make_tokenizer(shape["vocabulary"]), make_model(shape, "scorer", 5).to(request["device"])
    random_ids = np.random.default_rng(0).integers(2, shape["vocabulary"], (512, PROMPT_TOKENS)).tolist()
    questions = [Question(str(number), prompt_messages(ids), ids) for number, ids in enumerate(random_ids)]
    return Setup(
        folder, tokenizer, questions, ModelReward(scorer, tokenizer), scorer, request["episodes"], 4, 48, 0.05, 0.2, 0.0
    )


def tuned_setup(request: dict[str, Any]) -> Setup:
    """Return a setup with the default chain's tuned model, training questions, reward and settings."""
    params = read_settings(PROFILE)
    config = align.Config.model_validate(params["align"]["policy"])
    algorithm: Any = config.algorithm
    folder, instructions, reward = REQUIRED_PATHS
    tokenizer = chat.load_tokenizer(folder)
    tokenizer.padding_side = "left"
    table = tables.read(instructions).to_pylist()
    questions = align.training_questions(tokenizer, table, config.max_new_tokens)
    numerics = Numerics.model_validate({**params["numerics"], "threads": request["threads"]})
    reward_fn = rewards.open_reward(config.reward, reward, numerics, seconds=600.0)
    return Setup(
        folder, tokenizer, questions, reward_fn, make_trl_reward_model(reward_fn, tokenizer, questions),
        config.minibatch, algorithm.epochs, config.max_new_tokens, algorithm.kl.coefficient, algorithm.vf_clip_range,
        config.missing_eos_penalty,
    )  # fmt: skip


def make_tokenizer(vocabulary: int) -> Any:
    """Return a word-level tokenizer of `vocabulary` words, whose decoded text encodes to the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD_ID, "<end>": END_ID, **{f"w{i}": i for i in range(2, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<pad>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_model(shape: dict[str, int], kind: str, seed: int) -> Any:
    """Return a Llama model with random weights: `causal`, or a scorer with one output."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], intermediate_size=shape["feed_forward"], max_position_embeddings=256,
        pad_token_id=PAD_ID, eos_token_id=END_ID, bos_token_id=END_ID, tie_word_embeddings=True, num_labels=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(settings) if kind == "causal" else LlamaForSequenceClassification(settings)


def prompt_messages(ids: Sequence[int]) -> list[dict[str, str]]:
    """Return prompt ids as a user message of their words."""
    return [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}]


class ModelReward:
    """A reward function: the scorer's output for prompt and reply."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(self, prompts: Any, replies: Sequence[str]) -> list[float]:
        """Return the score of each reply, in one padded batch."""
        import torch

        rows = [
            self.tokenizer.encode(f"{asked[0]['content']} {text}", add_special_tokens=False)
            for asked, text in zip(prompts, replies, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = (ids != PAD_ID).long()
        with torch.no_grad():
            scores = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return [float(value) for value in scores]


def make_trl_reward_model(reward_fn: Any, tokenizer: Any, questions: Sequence[Question]) -> Any:
    """Return a reward function on texts as a module for TRL, which reads the reward from a row's last hidden state."""
    import torch

    messages_by_ids = {tuple(question.ids): question.messages for question in questions}
    lengths = {len(ids) for ids in messages_by_ids}

    class RewardBackbone(torch.nn.Module):
        """Maps ids (B, T) to each row's reward, repeated at every position."""

        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            """Return an output with hidden states (B, T, 1)."""
            rows = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
            cuts = [next(n for n in lengths if tuple(row[:n]) in messages_by_ids) for row in rows]
            texts = [sampling.decode_reply(tokenizer, row[cut:]) for row, cut in zip(rows, cuts, strict=True)]
            found = reward_fn([messages_by_ids[tuple(row[:cut])] for row, cut in zip(rows, cuts, strict=True)], texts)
            return SimpleNamespace(hidden_states=[torch.tensor(found)[:, None, None].expand(*input_ids.shape, 1)])

    class Reward(torch.nn.Module):
        """The attributes of a reward model that TRL uses."""

        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model, self.score = RewardBackbone(), torch.nn.Identity()

    return Reward()
