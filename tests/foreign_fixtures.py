"""A tiny third-party model as a Transformers folder, with its own tokenizer and chat template."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.training_fixtures import corpus

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS = 96


def foreign_tokenizer(vocabulary: int = 330) -> "PreTrainedTokenizerFast":
    """Return a byte-level tokenizer like SmolLM2's: digits are split, and there is no pad or mask token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in corpus()], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def foreign_model(tokenizer: "PreTrainedTokenizerFast", **changes: Any) -> "LlamaForCausalLM":
    """Return a small Llama with grouped queries and more rows in its embedding than the tokenizer has tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 6,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def write_foreign(folder: Path, **changes: Any) -> Path:
    """Write the model's folder and return it."""
    tokenizer = foreign_tokenizer()
    foreign_model(tokenizer, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
