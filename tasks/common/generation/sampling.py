"""Batched decoding of replies from a causal model with a key–value cache, reproducible for a seed.

Transformers' `generate` is not used for two reasons: it computes finished rows until the longest row is finished, while
here they leave the batch, and it cannot keep in step with processes that hold other shards of the same model.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.random_streams import Stream, seed_torch
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

# Finished rows leave the batch once at most this share of it is unfinished: each compaction copies the cache.
COMPACTION_SHARE = 0.75


def single_process(active: int) -> int:
    """Return the number of unfinished rows unchanged: there are no other processes to keep in step with."""
    return active


def generate_replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    numerics: Numerics,
    batch: int = 128,
    desc: str | None = None,
    max_active: Callable[[int], int] = single_process,
) -> list[list[int]]:
    """Return the reply to each prompt as token ids, with its end token (`chat.end_ids`) if that was reached in time.

    `temperature` 0 is greedy decoding. Prompts of similar length share a batch. torch's generator is seeded for each
    batch and restored at the end, so decoding neither depends on nor changes the random state of the process. `desc`
    is the label of a progress bar; None shows none. `max_active` returns the largest number of unfinished rows in any
    of the processes that decode in step.
    """
    import torch
    from tqdm import tqdm

    result: list[list[int]] = [[] for _ in prompts]
    was_training, device, ends = model.training, next(model.parameters()).device, chat.end_ids(model, tokenizer)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        groups = chat.length_buckets(prompts, batch)
        for number, group in enumerate(tqdm(groups, desc=desc, disable=desc is None, mininterval=2)):
            ids, mask = chat.pad_batch([prompts[i] for i in group], tokenizer.pad_token_id, device, left=True)  # (B, P)
            seed_torch(seed, Stream.REPLY_BATCH, number)
            with models.autocast(model, numerics):
                batch_replies = _generate_batch(model, ids, mask, max_new_tokens, temperature, ends, max_active)
            for i, reply in zip(group, batch_replies, strict=True):
                result[i] = reply
    model.train(was_training)
    return result


def _generate_batch(
    model: Any, ids: "torch.Tensor", mask: "torch.Tensor", max_new_tokens: int, temperature: float,
    ends: Sequence[int],    max_active: Callable[[int], int],
) -> list[list[int]]:  # fmt: skip
    """Return the reply to each of the prompts (B, P), which are padded on the left."""
    import torch

    from tasks.common.overrides.growing_cache import growing_cache

    replies: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # the index of each batch row's reply
    cache, positions = growing_cache(model.config), (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # (B, V)  # fmt: skip
        ids = sample_tokens(logits / temperature) if temperature else logits.argmax(-1, keepdim=True)  # (B, 1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if not has_ended(replies[row], ends):
                replies[row].append(token)
        active = [index for index, row in enumerate(rows) if not has_ended(replies[row], ends)]
        if not max_active(len(active)):
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
        if len(active) <= COMPACTION_SHARE * len(rows):
            kept = torch.tensor(active or [0], device=ids.device)  # one row stays while other processes are not done
            rows = [rows[index] for index in kept.tolist()]
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            cache.batch_select_indices(kept)
    return replies


def has_ended(reply: Sequence[int], ends: Sequence[int]) -> bool:
    """Return whether a reply's last token is an end token."""
    return bool(reply) and reply[-1] in ends


def sample_tokens(logits: "torch.Tensor") -> "torch.Tensor":
    """Sample a token for each row of logits (B, V) by inverse-CDF sampling, shape (B, 1).

    It draws one uniform number per row. `torch.multinomial` draws one per vocabulary entry, which takes a tenth of the
    time of a small model's step.
    """
    import torch

    cdf = torch.softmax(logits.double(), -1).cumsum(-1)  # (B, V)
    quantile = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, quantile, right=True).clamp(max=cdf.shape[1] - 1)


def decode_reply(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """Return a reply's text without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()
