"""Tiny random folders of every supported family of models, as people have them: the columns of the architecture matrix.

`write_family(name, folder, shape)` writes one. Its seed and sizes are arguments, so that the matrix can be run with
others.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else "
    "message['role'] }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
TEXT = (
    "the capital of France is Paris and Rome lies in Italy while Tokyo belongs to Japan what where who is a river "
    "mountain hello answer question name city of my your large small seven three one blue green said went home again"
)


@dataclass(frozen=True)
class Shape:
    """Sizes and seed of a family's model."""

    seed: int = 0
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    positions: int = 96
    window: int = 12  # of sliding attention
    vocabulary: int = 320

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of most Transformers configs."""
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "intermediate_size": 2 * self.hidden, "max_position_embeddings": self.positions, "initializer_range": 0.3,
        }  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: Transformers' name of its config, its tokenizer, and what differs from a plain Llama."""

    model_type: str
    tokenizer: str = "bytes"  # bytes | fallback | wordpiece | unigram
    template: str | None = CHATML
    bos: bool = True
    changes: Callable[[Shape], dict[str, Any]] = field(default=lambda shape: {})
    masked: bool = False


def _grouped(shape: Shape) -> dict[str, Any]:
    return {"num_key_value_heads": shape.heads // 2}


def _sliding(shape: Shape) -> dict[str, Any]:
    return {**_grouped(shape), "sliding_window": shape.window}


def _alternating(shape: Shape) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return {**_sliding(shape), "head_dim": 16, "layer_types": [kinds[i % 2] for i in range(shape.layers)]}


def _gemma2(shape: Shape) -> dict[str, Any]:
    return {
        **_alternating(shape), "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 16,
    }  # fmt: skip


def _gemma3(shape: Shape) -> dict[str, Any]:
    return {**_alternating(shape), "query_pre_attn_scalar": 16}


def _longrope(shape: Shape) -> dict[str, Any]:
    half = shape.hidden // shape.heads // 2
    return {
        **_grouped(shape), "sliding_window": None, "max_position_embeddings": 3 * shape.positions,
        "original_max_position_embeddings": shape.positions,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": shape.positions,
            "short_factor": [1.0 + 0.1 * i for i in range(half)], "long_factor": [2.0 + 0.9 * i for i in range(half)],
        },
    }  # fmt: skip


def _gpt2(shape: Shape) -> dict[str, Any]:
    return {
        "n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads, "n_positions": shape.positions,
        "initializer_range": 0.3,
    }  # fmt: skip


def _opt(shape: Shape) -> dict[str, Any]:
    return {"ffn_dim": 2 * shape.hidden, "word_embed_proj_dim": shape.hidden, "init_std": 0.3}


def _experts(names: Iterable[str]) -> Callable[[Shape], dict[str, Any]]:
    experts, active = names
    return lambda shape: {**_grouped(shape), experts: 4, active: 2}


def _modernbert(shape: Shape) -> dict[str, Any]:
    return {"local_attention": shape.window, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 2.0}


def _distilbert(shape: Shape) -> dict[str, Any]:
    return {"dim": shape.hidden, "n_layers": shape.layers, "n_heads": shape.heads, "hidden_dim": 2 * shape.hidden}


def _deberta(shape: Shape) -> dict[str, Any]:
    return {
        "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True, "max_relative_positions": -1,
    }  # fmt: skip


DECODERS = {
    "llama": Family("llama", "fallback", LLAMA2, changes=_grouped),
    "llama3": Family("llama", changes=lambda shape: {
        **_grouped(shape), "mlp_bias": True, "attention_bias": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": shape.positions // 3}}),
    "mistral": Family("mistral", "fallback", LLAMA2, changes=_sliding),
    "qwen2": Family("qwen2", bos=False, changes=_grouped),
    "qwen3": Family("qwen3", bos=False, changes=lambda shape: {**_grouped(shape), "head_dim": 16}),
    "gemma": Family("gemma", "fallback", GEMMA, changes=lambda shape: {**_grouped(shape), "head_dim": 16}),
    "gemma2": Family("gemma2", "fallback", GEMMA, changes=_gemma2),
    "gemma3": Family("gemma3_text", "fallback", GEMMA, changes=_gemma3),
    "phi3": Family("phi3", "fallback", CHATML, changes=_grouped),
    "phi3-longrope": Family("phi3", "fallback", CHATML, changes=_longrope),
    "smollm3": Family("smollm3", changes=lambda shape: {**_grouped(shape), "no_rope_layers": [1, 0] * shape.layers}),
    "olmo2": Family("olmo2", bos=False, changes=_grouped),
    "granite": Family("granite", changes=lambda shape: {**_grouped(shape), "embedding_multiplier": 3.0,
        "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "gpt2": Family("gpt2", changes=_gpt2),
    "gpt_neox": Family("gpt_neox", bos=False),
    "opt": Family("opt", changes=_opt),
    "falcon": Family("falcon", bos=False, changes=lambda shape: {"multi_query": True, "parallel_attn": True}),
    "stablelm": Family(
        "stablelm", bos=False, changes=lambda shape: {**_grouped(shape), "partial_rotary_factor": 0.5}
    ),
    "mixtral": Family("mixtral", "fallback", LLAMA2, changes=_experts(("num_local_experts", "num_experts_per_tok"))),
    "olmoe": Family("olmoe", bos=False, changes=_experts(("num_experts", "num_experts_per_tok"))),
}  # fmt: skip
ENCODERS = {
    "bert": Family("bert", "wordpiece", None, masked=True),
    "roberta": Family("roberta", "bytes", None, masked=True),
    "distilbert": Family("distilbert", "wordpiece", None, masked=True, changes=_distilbert),
    "modernbert": Family("modernbert", "bytes", None, masked=True, changes=_modernbert),
    "deberta-v2": Family("deberta-v2", "unigram", None, masked=True, changes=_deberta),
}
FAMILIES = DECODERS | ENCODERS


def write_family(name: str, folder: Path, shape: Shape = Shape(), **save: Any) -> Path:
    """Write the folder of a family's random model and return it; `save` goes to `save_pretrained`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    family = FAMILIES[name]
    tokenizer = make_tokenizer(family, shape)
    config = AutoConfig.for_model(family.model_type, **{
        **shape.sizes, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **family.changes(shape),
    })  # fmt: skip
    torch.manual_seed(shape.seed)
    build: Any = AutoModelForMaskedLM if family.masked else AutoModelForCausalLM
    model = build.from_config(config)
    _roughen(model, shape.seed)
    model.save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    return folder


def _roughen(model: Any, seed: int) -> None:
    """Give biases and norms random values: a fresh model's zeros and ones would hide that they are lost."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def make_tokenizer(family: Family, shape: Shape) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of a family, trained on a few sentences."""
    from transformers import PreTrainedTokenizerFast

    special, names = _special_tokens(family)
    tokenizer = TOKENIZERS[family.tokenizer](special, shape.vocabulary)
    if family.masked:
        _add_ends(tokenizer, names["cls_token"], names["sep_token"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = family.template
    return wrapped


def _special_tokens(family: Family) -> tuple[list[str], dict[str, str]]:
    if family.masked and family.tokenizer == "bytes":  # RoBERTa's
        special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
        pad, unknown, first, last, mask = special
        ends = {"bos_token": first, "eos_token": last, "cls_token": first, "sep_token": last}
        return special, {"pad_token": pad, "unk_token": unknown, "mask_token": mask, **ends}
    if family.masked:  # BERT's have neither BOS nor EOS
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names |= {"mask_token": "[MASK]"}
        return list(names.values()), names
    if family.template == GEMMA:
        return ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"], {
            "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
        }  # fmt: skip
    if family.template == LLAMA2:
        return ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = {"eos_token": "<|im_end|>", **({"bos_token": "<|im_start|>"} if family.bos else {})}
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {**names, "unk_token": "<|endoftext|>"}


def _sentences() -> list[str]:
    words = TEXT.split()
    return [" ".join(words[start : start + 9]) + "." for start in range(len(words) - 9)]


def _bytes_tokenizer(special: list[str], vocabulary: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_sentences(), trainer)
    return tokenizer


def _fallback_tokenizer(special: list[str], vocabulary: int) -> "Tokenizer":
    """Return a tokenizer like Llama 2's: spaces are `▁`, and unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted({character for sentence in _sentences() for character in sentence.replace(" ", "▁")})
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*special, *byte_tokens, *characters]))}
    merges = []
    for word in dict.fromkeys(TEXT.split()):
        piece = "▁" + word
        for end in range(2, len(piece) + 1):
            left, right = piece[: end - 1], piece[end - 1]
            if (left, right) not in merges and len(vocab) < vocabulary:
                merges.append((left, right))
                vocab.setdefault(left + right, len(vocab))
    merges = [(left, right) for left, right in merges if left in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _wordpiece_tokenizer(special: list[str], vocabulary: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_sentences(), trainer)
    return tokenizer


def _unigram_tokenizer(special: list[str], vocabulary: int) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=min(vocabulary, 150), special_tokens=special, unk_token="[UNK]", show_progress=False
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    return tokenizer


def _add_ends(tokenizer: "Tokenizer", first: str, last: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)]
    )


TOKENIZERS: dict[str, Callable[[list[str], int], "Tokenizer"]] = {
    "bytes": _bytes_tokenizer, "fallback": _fallback_tokenizer, "wordpiece": _wordpiece_tokenizer,
    "unigram": _unigram_tokenizer,
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content
