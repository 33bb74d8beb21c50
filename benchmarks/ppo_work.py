"""What `benchmarks/ppo_run.py` gives both sides: a model, questions, and a reward that either can ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import harness
from tasks import ppo
from tasks.common import tables
from tasks.common.alignment import rewards
from tasks.common.evaluation import sampling
from tasks.common.settings import Numerics, read_params
from tasks.common.text import chat
from tasks.common.text.chat import Question

PROFILE = harness.ROOT / "profiles" / "default.yaml"
NEEDED = tuple(
    harness.ROOT / "data" / path for path in ("finetune/model", "validate/instructions", "reward/policy/model")
)  # of the chain
END, PAD, LENGTH = 1, 0, 12


@dataclass(frozen=True)
class Work:
    """What all sides are given: a model, questions, a reward, and how much of what is done with them."""

    folder: Path  # the model's
    tokenizer: Any
    questions: list[Question]
    judge: Any  # as ours asks it
    scorer: Any  # the same, as TRL asks it
    minibatch: int
    epochs: int
    reply: int  # most tokens of one
    kl: float
    value_clip: float
    missing_end_penalty: float


def fresh_work(request: dict[str, Any], folder: Path) -> Work:
    """Return a fresh model's, whose replies never end, and whose reward is another fresh model's score."""
    shape = request["shape"]
    fresh(shape, "causal", 4).save_pretrained(folder)
    tokenizer, scorer = tokenizer_of(shape["vocabulary"]), fresh(shape, "scorer", 5).to(request["device"])
    drawn = np.random.default_rng(0).integers(2, shape["vocabulary"], (512, LENGTH)).tolist()
    questions = [Question(str(number), asked_as(ids), ids) for number, ids in enumerate(drawn)]
    return Work(
        folder, tokenizer, questions, Scores(scorer, tokenizer), scorer, request["episodes"], 4, 48, 0.05, 0.2, 0.0
    )


def tuned_work(request: dict[str, Any]) -> Work:
    """Return the default chain's: its tuned model, training questions and reward, and its profile's settings."""
    params = read_params(PROFILE)
    config = ppo.Config.model_validate(params["ppo"])
    algorithm: Any = config.algorithm
    folder, instructions, reward = NEEDED
    tokenizer = chat.load_tokenizer(folder)
    tokenizer.padding_side = "left"
    table = tables.read(instructions).to_pylist()
    questions = ppo.questions_of(tokenizer, table, config.max_new_tokens)
    numerics = Numerics.model_validate({**params["numerics"], "threads": request["threads"]})
    judge = rewards.open_judge(config.reward, reward, numerics)
    return Work(
        folder, tokenizer, questions, judge, as_trl_asks(judge, tokenizer, questions), config.minibatch,
        algorithm.epochs, config.max_new_tokens, algorithm.kl.coefficient, algorithm.value_clip,
        config.missing_end_penalty,
    )  # fmt: skip


def tokenizer_of(vocabulary: int) -> Any:
    """Return a tokenizer of so many words, which its own text brings back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<end>": END, **{f"w{i}": i for i in range(2, vocabulary)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<pad>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def fresh(shape: dict[str, int], kind: str, seed: int) -> Any:
    """Return a fresh Llama model, causal or with a head that gives one number."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], intermediate_size=shape["feed_forward"], max_position_embeddings=256,
        pad_token_id=PAD, eos_token_id=END, bos_token_id=END, tie_word_embeddings=True, num_labels=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(settings) if kind == "causal" else LlamaForSequenceClassification(settings)


def asked_as(ids: Sequence[int]) -> list[dict[str, str]]:
    """Return a prompt as the message that its words are."""
    return [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}]


class Scores:
    """The reward model, which reads prompt and reply; its scores are the reward."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def __call__(self, prompts: Any, replies: Sequence[str]) -> list[float]:
        """Return the score of each reply, its tokens the words of its text; several of one length together."""
        import torch

        rows = [
            self.tokenizer.encode(f"{asked[0]['content']} {text}", add_special_tokens=False)
            for asked, text in zip(prompts, replies, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = (ids != PAD).long()
        with torch.no_grad():
            scores = self.model(input_ids=ids, attention_mask=mask).logits[:, 0]
        return [float(value) for value in scores]


def as_trl_asks(judge: Any, tokenizer: Any, questions: Sequence[Question]) -> Any:
    """Return a judge of texts as a module of which TRL takes the last state of a row for its reward."""
    import torch

    asked = {tuple(question.ids): question.messages for question in questions}
    lengths = {len(ids) for ids in asked}

    class Rated(torch.nn.Module):
        """Reads ids (B, T) and gives each row's reward at all of its places."""

        def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
            """Return an output with (B, T, 1) states."""
            rows = [ids[real].tolist() for ids, real in zip(input_ids, attention_mask.bool(), strict=True)]
            cuts = [next(n for n in lengths if tuple(row[:n]) in asked) for row in rows]
            texts = [sampling.decode(tokenizer, row[cut:]) for row, cut in zip(rows, cuts, strict=True)]
            found = judge([asked[tuple(row[:cut])] for row, cut in zip(rows, cuts, strict=True)], texts)
            return SimpleNamespace(hidden_states=[torch.tensor(found)[:, None, None].expand(*input_ids.shape, 1)])

    class Reward(torch.nn.Module):
        """What TRL looks for in a reward model."""

        base_model_prefix = "model"

        def __init__(self) -> None:
            super().__init__()
            self.model, self.score = Rated(), torch.nn.Identity()

    return Reward()
