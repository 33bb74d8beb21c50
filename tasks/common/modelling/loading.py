"""Loading a model folder with Transformers: sharded, in any float type, an adapter with its base, a resized vocabulary.

Transformers initializes missing weights at random and only logs it, so the names of new weights are returned.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.common import model_folder
from tasks.common.harness.job import StageError
from tasks.common.overrides import rope_config
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loaded(NamedTuple):
    """A model in float32 on the device, and the names of the weights that its folder lacks."""

    model: Any
    new_weights: list[str]


def load(auto_class: Any, path: Path, numerics: Numerics, **settings: Any) -> Loaded:
    """Load a folder with one of Transformers' Auto classes; raise StageError if the folder cannot be used.

    An adapter is merged into its base model. Weights come from safetensors only and no code of the folder is run.
    """
    problems = list(model_folder.problems(path))
    if problems:
        raise StageError(f"{path} cannot be used as a model: {'; '.join(problems)}.")
    if model_folder.is_adapter(path):
        with _merged_adapter(path, numerics) as merged:
            return load(auto_class, merged, numerics, **settings)
    model, info = _from_pretrained(auto_class, path, numerics, settings)
    if info["mismatched_keys"]:
        names = sorted(name for name, *_ in info["mismatched_keys"])
        raise StageError(
            f"the weights in {path} do not match its config.json: {len(names)} have another shape, among them "
            f"{', '.join(names[:3])}; download the folder again."
        )
    _add_missing_rows(model, path)
    return Loaded(model.to(numerics.device), sorted(info["missing_keys"]))


def load_complete(auto_class: Any, path: Path, numerics: Numerics) -> "PreTrainedModel":
    """Load a model whose folder must have all of its weights; raise StageError if some are missing."""
    loaded = load(auto_class, path, numerics)
    if loaded.new_weights:
        raise StageError(
            f"the weights in {path} do not match its config.json: {len(loaded.new_weights)} are missing, among them "
            f"{', '.join(loaded.new_weights[:3])}; download the folder again."
        )
    model: PreTrainedModel = loaded.model
    return model


def read_config(path: Path, **changes: Any) -> Any:
    """Read the config of a model folder, an adapter's from its base model; `changes` replace its settings."""
    from transformers import AutoConfig

    rope_config.install()
    try:
        return AutoConfig.from_pretrained(model_folder.base_of(path), trust_remote_code=False, **changes)
    except Exception as error:  # of Transformers and its checks of fields: no common class
        raise StageError(
            f"the config.json of {path} is not one that this release of Transformers knows "
            f"({' '.join(str(error).split())[:200]}): correct it, or use another model."
        ) from error


def _from_pretrained(auto_class: Any, path: Path, numerics: Numerics, settings: dict[str, Any]) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    config = settings.pop("config", None) or read_config(path, **settings)
    if type(config) not in auto_class._model_mapping:
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise StageError(
            f"{path} holds a {config.model_type} model, for which Transformers has no class for {kind}: use another "
            "model, or a stage that needs no such class (docs/reference/architectures.md)."
        )
    model_class = auto_class._model_mapping[type(config)]
    transformers_logging.disable_progress_bar()  # of loading weights, which is quick
    try:
        return model_class.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=attention(model_class, config, numerics),
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,  # `load` reports them
            trust_remote_code=False,  # by default Transformers asks on a terminal whether to run the folder's code
        )  # fmt: skip
    except SafetensorError as error:
        raise StageError(f"the weights in {path} are damaged or incomplete ({error}): download them again.") from error


def attention(model_class: Any, config: Any, numerics: Numerics) -> str:
    """Return the attention kernel of a model: the setting, or eager where torch's fused kernel would be wrong.

    The fused kernel has no soft-cap (Gemma 2): Transformers leaves the cap out and only logs it. Some classes
    (DeBERTa) have no other attention than their own.
    """
    supported = getattr(model_class, "_supports_sdpa", False)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return numerics.attention if supported and not capped else "eager"


def _add_missing_rows(model: Any, path: Path) -> None:
    """Add rows to the embedding for tokens of the tokenizer beyond it; each new row is the mean of the others."""
    import torch

    weight = model.get_input_embeddings().weight
    rows, tokens = len(weight), _token_count(path)
    if tokens <= rows:
        return
    print(
        f"the tokenizer in {path} has {tokens} tokens and the model's embedding {rows} rows: {tokens - rows} rows are "
        "added, each the mean of the others",
        flush=True,
    )
    model.resize_token_embeddings(tokens, mean_resizing=False)
    heads = [head for head in (model.get_input_embeddings(), model.get_output_embeddings()) if head is not None]
    with torch.no_grad():
        for table in {id(head.weight): head.weight for head in heads}.values():
            table[rows:] = table[:rows].mean(0)


def _token_count(path: Path) -> int:
    """Return the number of tokens of a folder's tokenizer: its highest id plus one; 0 without a tokenizer."""
    file = path / "tokenizer.json"
    return _count_tokens(file, file.stat().st_mtime_ns) if file.is_file() else 0


@lru_cache(maxsize=8)
def _count_tokens(file: Path, _changed: int) -> int:
    from tokenizers import Tokenizer

    return 1 + max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1)


@contextmanager
def _merged_adapter(path: Path, numerics: Numerics) -> Iterator[Path]:
    """Write a PEFT adapter, merged into its base model, to a temporary folder, with the adapter's own tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    base = model_folder.base_of(path)
    masked = model_folder.kind_of(model_folder.read_json(base / model_folder.CONFIG)) == "masked"
    cpu = numerics.model_copy(update={"device": "cpu"})
    model = load_complete(AutoModelForMaskedLM if masked else AutoModelForCausalLM, base, cpu)
    _add_missing_rows(model, path)
    with tempfile.TemporaryDirectory(prefix="bessemer-merged-") as folder:
        try:
            merged: Any = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
        except (ValueError, RuntimeError) as error:
            raise StageError(f"the adapter in {path} does not fit its base model {base}: {error}") from error
        merged.save_pretrained(folder, safe_serialization=True)
        chat.read_tokenizer(path).save_pretrained(folder)
        yield Path(folder)
