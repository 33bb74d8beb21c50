"""Pretraining that goes on from a model: what a folder must hold, and how it is opened.

A folder is one that Transformers writes: `config.json`, weights as safetensors, and the fast tokenizer that the model
was trained with. Nothing of it is run: no code of the folder's own, and no pickles. Everything that can be told from
its files is told before weights are loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.settings import Numerics, Settings
from tasks.common.stage import StageError
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RULES = ("normalizer", "pre_tokenizer", "model", "decoder")  # of a tokenizer's JSON: how text becomes tokens, and back


class New(Shape):
    """A model is trained from nothing."""

    name: Literal["new"] = Field(description="Where the weights come from")
    path: Literal["data/tokenize/tokenizer"] = Field(description="All that it starts from: its vocabulary")


class From(Settings):
    """Training goes on from the weights of a given model, with its own tokenizer."""

    name: Literal["from"] = Field(description="Where the weights come from")
    path: str = Field(description="Folder of a Transformers causal model, absolute or in the project", min_length=1)


def open_decoder(
    source: From, path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return the causal model of a folder, in float32; raise StageError with all that keeps it from being trained.

    `tokenizer` is the one that the shards were made with, whose special tokens the model is told.
    """
    from transformers import GenerationConfig

    wrong = list(_misfits(path, tokenizer, window))
    if wrong:
        raise StageError(f"pretrain.clm.model.path: {source.path} cannot be trained on. " + " ".join(wrong))
    model = models.load_decoder(path, numerics)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    # Its own may hold ways to draw replies that nobody asked for here.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def _misfits(path: Path, tokenizer: "PreTrainedTokenizerFast", window: int) -> Iterator[str]:
    """Tell what is wrong with a folder: what was found, what was expected and what to do."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"Expected a folder of a Transformers model with a config.json, which could not be read: {error}."
        return
    yield from _odd_config(config)
    yield from _odd_weights(path)
    if not (path / "tokenizer.json").is_file():
        yield (
            "It holds no tokenizer.json, so nothing tells whether the shards speak its language; load its tokenizer "
            "with AutoTokenizer and save it there."
        )
        return
    differs = difference(tokenizer, chat.load_tokenizer(path))
    if differs:
        yield (
            f"It reads with another tokenizer than the shards were made with: {differs}. "
            "Set tokenize.tokenizer to {name: from} with this path."
        )
    rows, positions = config.get("vocab_size"), config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(rows, int) and rows < len(tokenizer):
        yield f"Its embedding has {rows} rows, fewer than the {len(tokenizer)} tokens of the tokenizer; take its own."
    for name, length in (("tokenize.context", tokenizer.model_max_length), ("pretrain.clm.window", window)):
        if isinstance(positions, int) and length > positions:
            yield f"It knows {positions} positions, and {name} is {length}; make that no more than {positions}."


def _odd_config(config: dict[str, Any]) -> Iterator[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if config.get("auto_map"):
        yield "It brings code of its own (auto_map), which is never run here; take a model that Transformers knows."
        return
    kind, found = config.get("model_type"), config.get("architectures") or []
    wanted = CAUSAL.get(str(kind))
    if wanted is None or wanted not in found:
        known = f"; of type {kind}, that is {wanted}" if wanted else ""
        yield f"Expected a causal language model that Transformers knows{known}, found {', '.join(found) or kind}."
    if config.get("quantization_config"):
        yield "Its weights are quantized, and training takes whole ones; take the model that it was made from."


def _odd_weights(path: Path) -> Iterator[str]:
    if (path / WEIGHTS).is_file():
        return
    if (path / INDEX).is_file():
        try:
            index: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, LookupError) as error:
            yield f"Its {INDEX} cannot be read ({error})."
            return
        absent = sorted(name for name in set(index.values()) if not (path / name).is_file())
        if absent:
            yield f"Of the shards that {INDEX} names, {', '.join(absent)} {'are' if absent[1:] else 'is'} missing."
        return
    if (path / "adapter_config.json").is_file():
        yield "It holds an adapter and no model; merge it into its base model (peft: merge_and_unload) and save that."
        return
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    found = f"found {', '.join(pickled)}, which is pickled: a pickle runs code" if pickled else "found none"
    yield f"Expected weights in {WEIGHTS}, {found}; save the model with save_pretrained(safe_serialization=True)."


def difference(ours: "PreTrainedTokenizerFast", theirs: "PreTrainedTokenizerFast") -> str | None:
    """Return the first thing in which two tokenizers differ, of what bears on ids; None where there is none."""
    vocabularies = ours.get_vocab(), theirs.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        mine, other = vocabularies
        changed = sorted(
            (token for token in {**mine, **other} if mine.get(token) != other.get(token)),
            key=lambda token: (min(mine.get(token, 2**31), other.get(token, 2**31)), token),
        )
        token = changed[0]
        told = [f"id {found[token]}" if token in found else "none" for found in vocabularies]
        return (
            f"{len(changed)} tokens have other ids, the first is {token!r} ({told[0]} in the shards', {told[1]} here)"
        )
    rules = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (ours, theirs)]
    for rule in RULES:
        if rules[0][rule] != rules[1][rule]:
            return f"the tokens are the same, but the {rule.replace('_', '-')} that makes them of a text differs"
    for name in ("bos_token", "eos_token"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"its {name} is {getattr(theirs, name)!r} and not {getattr(ours, name)!r}"
    return None
