"""Models with a head: classifiers, regressors and reward models, loaded or with a newly initialized head."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.common.harness.job import StageError
from tasks.common.modelling import loading, models
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HEAD_NAMES = ("score", "classifier")  # Transformers' names of the classification head of a decoder and of an encoder


def head_outputs(
    model: Any, tokenizer: "PreTrainedTokenizerFast", rows: Sequence[list[int]], numerics: Numerics, batch_rows: int,
    desc: str | None = None,
) -> "torch.Tensor":  # fmt: skip
    """Return the head's outputs for each row of token ids, (N, outputs) in float32, `batch_rows` rows at a time.

    The outputs of a token-level head are averaged over a row's tokens. `desc` is the title of the progress bar; without
    it none is shown.
    """
    import torch
    from tqdm import tqdm

    device = next(model.parameters()).device
    buckets = chat.length_buckets(rows, batch_rows)
    parts = []
    for bucket in tqdm(buckets, desc=desc, disable=desc is None, mininterval=2):
        ids, mask = chat.pad_batch([rows[i] for i in bucket], tokenizer.pad_token_id, device)  # (rows, T)
        with models.autocast(model, numerics):
            outputs = model(input_ids=ids, attention_mask=mask).logits.float()
        if outputs.ndim == 3:  # (rows, T, outputs)
            outputs = (outputs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        parts.append(outputs)
    restore_order = torch.tensor([i for bucket in buckets for i in bucket], device=device).argsort()
    return torch.cat(parts)[restore_order]


def load_scorer(path: Path, numerics: Numerics, heads: int | None = 1) -> "PreTrainedModel":
    """Load a model with a scalar head of `heads` outputs, in float32, onto the device; a missing head is initialized.

    Without `heads` the folder's config gives their number.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    settings = {} if heads is None else {"num_labels": heads}
    architectures = loading.read_config(path).architectures or []
    token_level = any(name.endswith("ForTokenClassification") for name in architectures)
    auto_class: Any = AutoModelForTokenClassification if token_level else AutoModelForSequenceClassification
    if heads is None:
        return loading.load_complete(auto_class, path, numerics)
    return _load_with_new_head(auto_class, path, numerics, **settings)


def new_scorer(
    path: Path, numerics: Numerics, heads: int, *, layers: int | None = None, token_level: bool = False
) -> "PreTrainedModel":
    """Load a model to train as a reward model: no dropout, newly initialized heads from N(0, 1/(d + 1)) with bias 0.

    As in Stiennon et al. 2020 and Huang et al. 2024, arXiv 2403.17031, section 6: initial scores differ, but not by
    much, and a reply gets the same score in training as later. Only the lowest `layers` blocks are kept. With
    `token_level` the head reads every token. Raises StageError if the model has fewer blocks.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = loading.read_config(path, num_labels=heads)
    if layers is not None:
        _keep_lowest_blocks(config, layers)
    config.classifier_dropout = 0.0  # many token-level models default to 0.1 if their config does not set it
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith(("_pdrop", "layerdrop"))):
            setattr(config, name, 0.0)
    auto_class: Any = AutoModelForTokenClassification if token_level else AutoModelForSequenceClassification
    model: Any = _load_with_new_head(auto_class, path, numerics, config=config)
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.out_features == heads]
    head = linear[-1]
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        torch.nn.init.zeros_(head.bias)
    scorer: PreTrainedModel = model
    return scorer


def _keep_lowest_blocks(config: Any, layers: int) -> None:
    if layers > config.num_hidden_layers:
        raise StageError(f"method.layers is {layers}, but the model has {config.num_hidden_layers} blocks.")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def load_classifier(path: Path, numerics: Numerics, labels: list[str]) -> "PreTrainedModel":
    """Load a model with a newly initialized head of one logit per label, in float32, onto the device."""
    from transformers import AutoModelForSequenceClassification

    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    return _load_with_new_head(AutoModelForSequenceClassification, path, numerics, num_labels=len(labels), **names)


def _load_with_new_head(auto_class: Any, path: Path, numerics: Numerics, **settings: Any) -> "PreTrainedModel":
    """Load a model of which the folder may lack the head; `new_weight_names` then returns the initialized weights."""
    loaded = loading.load(auto_class, path, numerics, **settings)
    loaded.model.new_weights = loaded.new_weights
    model: PreTrainedModel = loaded.model
    return model


def new_weight_names(model: Any) -> list[str]:
    """Return the names of a model's newly initialized weights: its head's, and a pooler's that the folder lacks."""
    return list(getattr(model, "new_weights", ()))
