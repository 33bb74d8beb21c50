"""Rules between the entries of the graph: an entry's settings against the model that it starts from.

The size, the context length and the kind of that model come from the graph. Missing values and values of the wrong type
are skipped here, because `params_file.check` reports them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tasks.common.model_graph import Params, entries_of, lookup
from tasks.rules.model_kinds import ModelKinds

# A setting, the size of the entry's model that it must not exceed, and why.
SIZE_LIMITS = (
    ("method.layers", "layers", "the model has no more blocks to train"),
    ("method.rank", "hidden", "the rank of a matrix is at most the model's width"),
)
WINDOW_SETTINGS = {  # settings that must not exceed the context length of the entry's model
    "pretrain": ("window",), "finetune": ("max_tokens", "task.packing", "pretraining_mix.window"),
    "reward": ("max_tokens",), "align": ("algorithm.ptx.window",), "prune": ("window",),
}  # fmt: skip
ACCEPTED_KINDS = {  # the kinds of models that a stage accepts, and their description
    "pretrain": (("causal", "masked"), "a causal or a masked model"),
    "finetune": (("causal", "masked"), "a causal or a masked model"),
    "reward": (("causal", "masked"), "a causal or a masked model"),
    "align": (("causal",), "a causal model"),
    "prune": (("causal",), "a causal model"),
    "quantize": (
        ("causal", "masked", "classification", "regression"), "a causal, masked, classification or regression model"
    ),
    "evaluate": (("causal", "masked", "classification", "regression", "engine"), "a model other than a reward model"),
}  # fmt: skip
KIND_NAMES = {
    "causal": "a causal model", "masked": "a masked model", "classification": "a classifier",
    "regression": "a regression model", "reward": "a reward model", "engine": "an exported model",
}  # fmt: skip
PACKAGE_KINDS = {  # the kinds of models that a part of the package accepts, and their description
    "chat": (("causal",), "a causal model"),
    "encoder": (("masked",), "a masked model"),
    "classifier": (("classification", "regression"), "a classifier or a regression model"),
}
SHARED_SETTINGS = ("judge_share", "input")  # settings that split the rankings between train and judge

Entry = tuple[str, str, Any]  # stage, where (`finetune.chat`), settings


def check_models(params: Params) -> Iterator[str]:
    """Report settings that contradict the models that they apply to; the graph must have no cycles."""
    kinds = ModelKinds(params)
    for entry in entries(params):
        yield from _check_sizes(entry, kinds)
        yield from _check_kinds(entry, kinds)
    yield from _check_package(kinds)
    yield from _check_ranking_splits(params)
    yield from _check_rewards(kinds)
    yield from _check_reply_lengths(kinds)
    yield from _check_windows(kinds)
    yield from _check_reply_room(kinds)
    yield from _check_mask_tokens(kinds)


def entries(params: Params, *stages: str) -> Iterator[Entry]:
    """Yield (stage, `stage.entry`, settings) of the entries of the given stages, by default of all."""
    for stage in stages or ACCEPTED_KINDS:
        for key, entry in entries_of(params, stage).items():
            yield stage, f"{stage}.{key}", entry


def check_at_most(path: str, value: Any, limit: str, maximum: Any, why: str) -> Iterator[str]:
    """Report a number above its maximum, which is the value of the setting `limit`."""
    if isinstance(value, int) and isinstance(maximum, int) and value > maximum:
        yield f"{path}: found {value}, but it should be at most {limit}, which is {maximum}: {why}"


def _model(stage: str, entry: Any) -> Any:
    """Return the folder that an entry's model starts from; None if it is trained from scratch."""
    if stage != "pretrain":
        return lookup(entry, "model")
    return lookup(entry, "model.path") if lookup(entry, "model.name") == "from" else None


def _check_sizes(entry: Entry, kinds: ModelKinds) -> Iterator[str]:
    """Report settings that exceed the size or the context length of the entry's model."""
    stage, where, content = entry
    model = _model(stage, content)
    for setting, size, why in SIZE_LIMITS if model else ():
        yield from check_at_most(f"{where}.{setting}", lookup(content, setting), *kinds.size(model, size), why)
    own = "tokenize.context", lookup(kinds.params, "tokenize.context")
    context = own if stage == "pretrain" else kinds.context(model)
    for setting in WINDOW_SETTINGS.get(stage, ()):
        if lookup(content, f"{setting.rpartition('.')[0]}.weight") == 0:
            continue  # the window is unused
        yield from check_at_most(
            f"{where}.{setting}", lookup(content, setting), *context, "the model's context is no longer"
        )
    if stage == "pretrain" and model:
        why = "the model that training starts from has no more positions"
        yield from check_at_most(*own, *kinds.size(model, "positions"), why)


def _check_kinds(entry: Entry, kinds: ModelKinds) -> Iterator[str]:
    """Report a model of a kind that the stage does not accept."""
    stage, where, content = entry
    model = _model(stage, content)
    kind, (accepted, description) = kinds.kind(model) if model else None, ACCEPTED_KINDS[stage]
    path = f"{where}.model.path" if stage == "pretrain" else f"{where}.model"
    if kind and kind not in accepted:
        yield f"{path}: found {model!r}, {KIND_NAMES.get(kind, kind)}, but it should be {description}"
    elif stage == "pretrain" and kind and kind != (objective := lookup(content, "objective")):
        yield f"{path}: found {model!r}, {KIND_NAMES[kind]}, but the objective {objective} needs a {objective} one"
    elif stage == "finetune" and lookup(content, "task.name") == "chat" and kind == "masked":
        yield f"{path}: found {model!r}, a masked model, but the task chat needs a causal one"
    elif stage == "finetune" and lookup(content, "method.name") == "adapter" and kind == "masked":
        yield (
            f"{where}.method.name: found 'adapter', which merges into a causal model's feed-forward layers, but "
            f"{model} is a masked model: use lora"
        )


def _check_package(kinds: ModelKinds) -> Iterator[str]:
    """Report models in `package` that cannot be served there."""
    exported = [f"data/quantize/{key}/model" for key in entries_of(kinds.params, "quantize")]
    for part, (accepted, description) in PACKAGE_KINDS.items():
        path = lookup(kinds.params, f"package.{part}")
        producer = kinds.producer(path)
        if producer and producer.stage != "quantize":
            yield (
                f"package.{part}: found {path!r}, but it should be the folder of an entry of quantize; there are "
                f"{', '.join(exported) or 'none'}"
            )
        elif producer and (found := kinds.kind(lookup(producer.settings, "model"))) not in (None, *accepted):
            yield (
                f"package.{part}: found {path!r}, made of {KIND_NAMES[str(found)]}, but it should be of {description}"
            )


def _check_ranking_splits(params: Params) -> Iterator[str]:
    """Report entries that split the rankings between train and judge in different ways."""
    splitting = [(where, entry) for _, where, entry in entries(params, "reward")]
    splitting += [
        (f"{where}.reward", lookup(entry, "reward"))
        for _, where, entry in entries(params, "align")
        if lookup(entry, "reward.name") == "rankings"
    ]
    for name in SHARED_SETTINGS:
        values = [
            (f"{where}.{name}", lookup(entry, name)) for where, entry in splitting if lookup(entry, name) is not None
        ]
        for where, value in values[1:]:
            if value != values[0][1]:
                yield (
                    f"{where}: found {value!r}, but {values[0][0]} is {values[0][1]!r}: make them equal, or the judge "
                    "would see rankings that were trained on"
                )


def _check_rewards(kinds: ModelKinds) -> Iterator[str]:
    """Report an alignment whose reward is the judge."""
    for _, where, entry in entries(kinds.params, "align"):
        path = lookup(entry, "reward.path") if lookup(entry, "reward.name") == "model" else None
        producer = kinds.producer(path)
        if producer and producer.stage != "reward":
            found = KIND_NAMES.get(str(kinds.kind(path)), "a model")
            yield f"{where}.reward.path: found {path!r}, {found}, but it should be a reward model"
        elif producer and lookup(producer.settings, "role") == "judge":
            yield (
                f"{where}.reward.path: found {path!r}, whose role is judge: a judge cannot evaluate a policy that was "
                "trained with it; use an entry whose role is train"
            )


def _check_reply_lengths(kinds: ModelKinds) -> Iterator[str]:
    """Report replies that may be longer than a reward model's input or an exported model's replies."""
    truncated = "the reward model sees only the beginning of a longer reply"
    for _, where, entry in entries(kinds.params, "align"):
        producer = kinds.producer(lookup(entry, "reward.path"))
        if producer and producer.stage == "reward":
            limit = f"{producer.where}.max_tokens", lookup(producer.settings, "max_tokens")
            yield from check_at_most(f"{where}.max_new_tokens", lookup(entry, "max_new_tokens"), *limit, truncated)
    for _, where, entry in entries(kinds.params, "evaluate"):
        if not kinds.gives_replies(lookup(entry, "model")):
            continue  # it gives no replies
        chain = kinds.chain(lookup(entry, "model"))
        for _, judge, settings in entries(kinds.params, "reward"):
            limit = f"{judge}.max_tokens", lookup(settings, "max_tokens")
            yield from check_at_most(f"{where}.max_new_tokens", lookup(entry, "max_new_tokens"), *limit, truncated)
        if chain and chain[0].stage == "quantize":
            for name, one in entries_of(kinds.params, "evaluations").items():
                own = chain[0].where, chain[0].settings, f"evaluations.{name}", one, ("max_new_tokens",)
                yield from _check_exported_lengths(*own) if _is_for(one, where) else ()
            yield from _check_exported_lengths(chain[0].where, chain[0].settings, where, entry, ("max_new_tokens",))
    for _, where, entry in entries(kinds.params, "quantize"):
        for producer in kinds.chain(lookup(entry, "model")):
            if producer.stage in ("align", "prune"):
                yield from _check_exported_lengths(where, entry, producer.where, producer.settings, ("max_new_tokens",))


def _check_windows(kinds: ModelKinds) -> Iterator[str]:
    """Report windows of evaluations that exceed the context of a model that they are for."""
    for name, one in entries_of(kinds.params, "evaluations").items():
        evaluated = [entry for _, where, entry in entries(kinds.params, "evaluate") if _is_for(one, where)]
        limits = dict.fromkeys(kinds.context(lookup(entry, "model")) for entry in evaluated)
        for limit in limits:
            why = "the model's context is no longer"
            yield from check_at_most(f"evaluations.{name}.window", lookup(one, "window"), *limit, why)


def _is_for(evaluation: Any, where: str) -> bool:
    """Return whether an evaluation is for an entry of evaluate (`evaluate.chat`), as far as its settings say."""
    models = lookup(evaluation, "models")
    return not isinstance(models, list) or where.partition(".")[2] in models


def _check_reply_room(kinds: ModelKinds) -> Iterator[str]:
    """Report replies that leave no room for a prompt in the model's context."""
    for _, where, entry in entries(kinds.params, "align", "prune", "quantize", "evaluate"):
        model = lookup(entry, "model")
        if not kinds.gives_replies(model):
            continue
        limit, context = kinds.context(model)
        length = lookup(entry, "max_new_tokens")
        if isinstance(length, int) and isinstance(context, int) and length >= context:
            yield (
                f"{where}.max_new_tokens: found {length}, but it should be less than {limit}, which is {context}: the "
                "prompt and the reply share the model's context"
            )


def _check_mask_tokens(kinds: ModelKinds) -> Iterator[str]:
    """Report masked training with a tokenizer that has no mask token."""
    remedy = "use the tokenizer of a masked model, or train one"
    for _, where, entry in entries(kinds.params, "pretrain"):
        if lookup(entry, "objective") == "masked" and kinds.has_mask_token(lookup(entry, "model.path")) is False:
            yield f"{where}.objective: found 'masked', but the tokenizer has no mask token: {remedy}"
    for _, where, entry in entries(kinds.params, "reward"):
        dropout = lookup(entry, "word_dropout")
        if dropout and kinds.has_mask_token(lookup(entry, "model")) is False:
            yield (
                f"{where}.word_dropout: found {dropout}, but the tokenizer of {lookup(entry, 'model')} has no mask "
                "token to replace words with: set it to 0"
            )


def _check_exported_lengths(
    exported: str, export: Any, where: str, entry: Any, settings: Iterable[str]
) -> Iterator[str]:
    limit = f"{exported}.max_new_tokens", lookup(export, "max_new_tokens")
    for setting in settings:
        yield from check_at_most(f"{where}.{setting}", lookup(entry, setting), *limit, "the exported model's limit")
