"""Continued pretraining from a given model: validates and loads its folder.

The folder has the format of Transformers: `config.json`, weights as safetensors, and the fast tokenizer that the model
was trained with. No code of the folder is run and no pickle is loaded. The folder's files are validated before weights
are loaded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tasks.common import model_folder
from tasks.common.harness.job import StageError
from tasks.common.modelling import models
from tasks.common.modelling.models import Shape
from tasks.common.settings import Numerics, Settings
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOKENIZER_RULES = ("normalizer", "pre_tokenizer", "model", "decoder")  # keys of a tokenizer's JSON


class New(Shape):
    """A new model with random weights."""

    name: Literal["new"] = Field(description="Source of the weights")
    path: Literal["data/tokenize/tokenizer"] = Field(description="Tokenizer, which gives the vocabulary")


class From(Settings):
    """Continued training from the weights of a given model, with its own tokenizer."""

    name: Literal["from"] = Field(description="Source of the weights")
    path: str = Field(
        description="Folder of a Transformers model of the objective's kind, absolute or in the project", min_length=1
    )


def open_decoder(
    source: From, path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return the causal model of a folder, in float32; raise StageError, which lists all problems, if it is unusable.

    `tokenizer` is the one that encoded the shards; its special token ids are written into the model's config.
    """
    from transformers import GenerationConfig

    _check_folder(source, path, tokenizer, window, "causal")
    model = models.load_decoder(path, numerics)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    # The folder's own generation config may set sampling options, which must not apply here.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return model


def open_encoder(
    source: From, path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, numerics: Numerics
) -> "PreTrainedModel":
    """Return the masked model of a folder, in float32; raise StageError, which lists all problems, if it is unusable.

    `tokenizer` is the one that encoded the shards. Its pad token fills short rows, and RoBERTa numbers positions from
    the config's, so the two must be the same.
    """
    _check_folder(source, path, tokenizer, window, "masked")
    model = models.load_encoder(path, numerics)
    pad = model.config.pad_token_id
    if pad is not None and pad != tokenizer.pad_token_id:
        raise StageError(
            f"model.path: {source.path} cannot be trained on. The pad_token_id of its config.json is {pad}, but its "
            f"tokenizer's is {tokenizer.pad_token_id}: make them equal."
        )
    return model


def _check_folder(source: From, path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, kind: str) -> None:
    problems = list(_validate_folder(path, tokenizer, window, kind))
    if problems:
        raise StageError(f"model.path: {source.path} cannot be trained on. " + " ".join(problems))


def _validate_folder(path: Path, tokenizer: "PreTrainedTokenizerFast", window: int, kind: str) -> Iterator[str]:
    """Yield the problems of a folder: what was found, what was expected and what to do."""
    found = [f"{problem[:1].upper()}{problem[1:]}." for problem in model_folder.problems(path)]
    yield from found
    base = model_folder.base_of(path)
    config = model_folder.read_json(base / model_folder.CONFIG)
    if not config:
        return
    if not found:
        yield from _validate_architecture(config, kind)
    if model_folder.is_adapter(path) and not (path / "tokenizer.json").is_file():
        path = base
    if not (path / "tokenizer.json").is_file():
        yield (
            "It contains no tokenizer.json, so its tokenizer cannot be compared with that of the shards; load its "
            "tokenizer with AutoTokenizer and save it there."
        )
        return
    differs = tokenizer_difference(tokenizer, chat.load_tokenizer(path))
    if differs:
        yield (
            f"Its tokenizer is not the one that encoded the shards: {differs}. "
            "Set tokenize.tokenizer to {name: from} with this path."
        )
    positions = model_folder.context_length(config)
    for name, length in (("tokenize.context", tokenizer.model_max_length), ("window", window)):
        if isinstance(positions, int) and length > positions:
            yield f"It has {positions} positions, but {name} is {length}; set it to {positions} or less."


def _validate_architecture(config: dict[str, Any], kind: str) -> Iterator[str]:
    from transformers.models.auto import modeling_auto as auto

    classes = {"causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    family, architectures = config.get("model_type"), config.get("architectures") or []
    expected = classes[kind].get(str(family))
    if expected is None or expected not in architectures:
        known = f"; of type {family}, that is {expected}" if expected else ""
        seen = ", ".join(architectures) or family
        yield f"Expected a {kind} language model that Transformers knows{known}, found {seen}."


def tokenizer_difference(
    shard_tokenizer: "PreTrainedTokenizerFast", model_tokenizer: "PreTrainedTokenizerFast"
) -> str | None:
    """Return a description of the first difference between two tokenizers that affects ids; None if there is none."""
    vocabularies = shard_tokenizer.get_vocab(), model_tokenizer.get_vocab()
    if vocabularies[0] != vocabularies[1]:
        shard_vocabulary, model_vocabulary = vocabularies
        changed = sorted(
            (
                token
                for token in {**shard_vocabulary, **model_vocabulary}
                if shard_vocabulary.get(token) != model_vocabulary.get(token)
            ),
            key=lambda token: (min(shard_vocabulary.get(token, 2**31), model_vocabulary.get(token, 2**31)), token),
        )
        token = changed[0]
        ids = [f"id {found[token]}" if token in found else "none" for found in vocabularies]
        return f"{len(changed)} tokens have other ids, the first is {token!r} ({ids[0]} in the shards', {ids[1]} here)"
    rules = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (shard_tokenizer, model_tokenizer)]
    for rule in TOKENIZER_RULES:
        if rules[0][rule] != rules[1][rule]:
            return f"the tokens are the same, but the {rule.replace('_', '-')} differs"
    for name in ("bos_token", "eos_token"):
        if getattr(shard_tokenizer, name) != getattr(model_tokenizer, name):
            return f"its {name} is {getattr(model_tokenizer, name)!r} and not {getattr(shard_tokenizer, name)!r}"
    return None
