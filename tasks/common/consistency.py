"""Settings that are right by themselves and wrong together, and settings that keep a stage from running.

What is no number, or is missing, `settings.check` tells by itself; here it is passed over.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks.common.settings import IN_STEP, ZERO

ENGINE = "numerics.parallel.engine"
TRAINING = ("pretrain.clm", "pretrain.mlm", "finetune", "reward", "prune")
# Setting, the one of another section that it must not exceed, and why; {tuned}, {rated}: what the stage starts from.
AT_MOST = (
    ("finetune.method.layers", "pretrain.{tuned}.model.layers", "the model has no more blocks to train"),
    ("finetune.method.rank", "pretrain.{tuned}.model.hidden", "a matrix of the model's width has no higher rank"),
    ("reward.method.layers", "pretrain.{rated}.model.layers", "the model has no more blocks to train"),
    ("reward.method.rank", "pretrain.{rated}.model.hidden", "a matrix of the model's width has no higher rank"),
    ("ppo.method.layers", "pretrain.clm.model.layers", "the model has no more blocks to train"),
    ("ppo.method.rank", "pretrain.clm.model.hidden", "a matrix of the model's width has no higher rank"),
    ("ppo.minibatch", "ppo.episodes", "an update learns from some of an iteration's replies"),
    ("ppo.max_new_tokens", "reward.max_tokens", "of a longer reply the reward model sees the beginning alone"),
    ("evaluate.max_new_tokens", "reward.max_tokens", "of a longer reply the judge sees the beginning alone"),
    ("tokenize.context", "pretrain.clm.model.positions", "the model that training goes on from knows no more"),
    *(
        (setting, "tokenize.context", "the models read no longer rows")
        for setting in (
            "pretrain.clm.window", "pretrain.mlm.window", "finetune.task.packing", "finetune.mix.window",
            "reward.max_tokens", "ppo.algorithm.ptx.window", "prune.window", "evaluate.window",
        )
    ),
    *(
        (setting, "quantize.policy.max_new_tokens", "the exported model says no more at once")
        for setting in (
            "ppo.max_new_tokens", "prune.max_new_tokens", "evaluate.max_new_tokens", "evaluate.toxicity.max_new_tokens",
        )
    ),
)  # fmt: skip
ONLY_WITH = (  # setting, its value, the setting that another value is wrong for, the value it needs, and why
    ("finetune.method.name", "qlora", "numerics.device", "cuda", "it computes on four-bit weights, which takes a GPU"),
    ("finetune.method.name", "qlora", ENGINE, "data", "four-bit weights cannot be shared out"),
    ("reward.method.name", "head", ENGINE, "data", "one layer is nothing to share out"),
    ("ppo.rollouts.name", "vllm", "numerics.parallel.processes", 1, "one process hands its weights over to it"),
    ("ppo.rollouts.name", "vllm", "ppo.algorithm.name", "ppo", "TRL's trainers are given replies of our own sampler"),
    ("pretrain.clm.model.name", "from", "tokenize.tokenizer.name", "from", "a model reads its own tokens alone"),
)  # fmt: skip
GIVEN = "pretrain.clm.model"  # where it names a folder, its size is in that folder's config.json, called so:
IN_CONFIG = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "positions": ("max_position_embeddings", "n_positions"),
}
ELEMENTWISE = ("sgd", "adam", "adamw", "lion")  # update rules that treat every number of a matrix alone
UNDIVIDED = ("adafactor",)  # torch's cannot take a matrix of which a process holds a part
ALTERNATIVES = ("dpo", "rloo", "grpo")  # to PPO
ENCODER = "data/pretrain/mlm/model"
CHECKPOINT = "data/ingest/checkpoint"
REWARD = ("reward@policy", "reward@judge")
ANSWERING = ("ppo", "prune", "quantize@policy", "evaluate@tuned", "evaluate@policy", "evaluate@pruned", "evaluate@int8")


def of_settings(params: dict[str, Any]) -> Iterator[str]:
    """Tell of settings that contradict each other."""
    tuned = "mlm" if _at(params, "finetune.model") == ENCODER else "clm"
    rated = {ENCODER: "mlm", "data/finetune/model": tuned}.get(str(_at(params, "reward.model")))
    for path, limit_path, why in AT_MOST:
        limit = limit_path.format(tuned=tuned, rated=rated)
        value, most = _at(params, path), _limit(params, limit)
        if isinstance(value, int) and isinstance(most, int) and value > most:
            yield f"{path}: found {value}, but it should be at most {limit}, which is {most}: {why}"
    for path, value, other, needed, why in ONLY_WITH:
        alone = other == ENGINE and _engine(params) is None  # then it is not used, whatever it is
        if _at(params, path) == value and _at(params, other) != needed and not alone:
            yield f"{path}: found {value!r}, which needs {other} to be {needed} (it is {_at(params, other)}): {why}"
    if _at(params, "reward.model") == CHECKPOINT and _at(params, "ingest.checkpoint") is None:
        yield f"reward.model: found {CHECKPOINT!r}, but ingest.checkpoint is null: name a model there, or take another"
    yield from _code(params)
    yield from _proximal(params)
    yield from _shares(params)
    yield from _shared_out(params)
    yield from _groups(params)


def of_stages(params: dict[str, Any], stages: Iterable[str]) -> Iterator[str]:
    """Tell of settings that some of these stages cannot run with, although others can."""
    wanted = list(stages)
    answering = (*ANSWERING, *(REWARD if _at(params, "reward.model") == "data/finetune/model" else []))
    task, names = _at(params, "finetune.task.name"), [stage for stage in wanted if stage in answering]
    if task != "chat" and names:
        yield (
            f"finetune.task.name: found {task!r}, but {', '.join(names)} need{'s' * (len(names) == 1)} chat, which "
            "alone trains a model that answers; end with `dvc repro finetune`"
        )
    plain = _at(params, "finetune.method.name") in ("full", "top") and task == "chat"
    uncut = ("pretrain@mlm", *REWARD, *([] if plain else ["finetune"]))
    names = [stage for stage in wanted if stage in uncut]
    if _engine(params) == "tensor" and names:
        yield (
            f"numerics.parallel.engine: found 'tensor', but {', '.join(names)} train{'s' * (len(names) == 1)} what it "
            "cannot cut: an encoder, a head, low-rank updates or adapters. Take data, fsdp or a ZeRO engine, or end "
            "with `dvc repro pretrain@clm`"
        )
    if "ppo" in wanted and _engine(params) in ("tensor", *ZERO):
        yield (
            f"numerics.parallel.engine: found {_engine(params)!r}, but ppo knows data and fsdp: it samples between two "
            "updates, which needs the model as torch has it"
        )
    algorithm, processes = _at(params, "ppo.algorithm.name"), _at(params, "numerics.parallel.processes")
    if "ppo" in wanted and algorithm in ALTERNATIVES and processes != 1:
        yield (
            f"ppo.algorithm.name: found {algorithm!r}, which trains in one process, but numerics.parallel.processes is "
            f"{processes}: make that 1, or take ppo, which shares its replies out"
        )


def _limit(params: dict[str, Any], path: str) -> Any:
    """Return a setting, or the number in the config of a given model; None where that is not there (yet)."""
    section, _, name = path.rpartition(".")
    if section != GIVEN or _at(params, f"{GIVEN}.name") != "from":
        return _at(params, path)
    try:
        config = json.loads(Path(str(_at(params, f"{GIVEN}.path")), "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a stage is still to make it, or it is none: then the stage that reads it says so
        return None
    return next((config[key] for key in IN_CONFIG[name] if key in config), None) if isinstance(config, dict) else None


def _engine(params: dict[str, Any]) -> Any:
    """Return the engine of several processes; one has none."""
    return None if _at(params, "numerics.parallel.processes") == 1 else _at(params, "numerics.parallel.engine")


def _shares(params: dict[str, Any]) -> Iterator[str]:
    """Tell of batches, or under `tensor` matrices, that cannot be shared out among the processes."""
    processes = _at(params, "numerics.parallel.processes")
    if _engine(params) == "tensor":
        for name in ("heads", "feed_forward"):
            path = f"{GIVEN}.{name}"
            if _at(params, f"{GIVEN}.name") == "new" and _divides(processes, _at(params, path)) is False:
                yield (
                    f"{path}: found {_at(params, path)}, but under the engine tensor it should be a multiple of "
                    f"numerics.parallel.processes ({processes}), each of which takes an equal part of every block"
                )
    for section in TRAINING:
        batch, accumulate = _at(params, f"{section}.batch"), _at(params, f"{section}.accumulate")
        told, parts = f"{section}.accumulate ({accumulate})", accumulate
        if _engine(params) != "tensor" and isinstance(accumulate, int) and isinstance(processes, int):
            told, parts = f"{told} x numerics.parallel.processes ({processes})", accumulate * processes
        if _divides(parts, batch) is False:
            yield f"{section}.batch: found {batch}, but it should be a multiple of {parts}: {told} parts of equal size"
        windows = _at(params, f"{section}.windows")
        if _engine(params) in IN_STEP and _divides(parts, windows) is False:
            yield (
                f"{section}.windows: found {windows}, but under the engine {_engine(params)} it should be a multiple "
                f"of {parts}, {told}: parts wait for each other's passes, so all must make as many"
            )

    for path in (
        ("ppo.episodes", "ppo.minibatch", "ppo.algorithm.ptx.batch") if _engine(params) in ("data", "fsdp") else ()
    ):
        if _divides(processes, _at(params, path)) is False:
            yield (
                f"{path}: found {_at(params, path)}, but it should be a multiple of numerics.parallel.processes "
                f"({processes}), each of which takes an equal part"
            )


def _divides(parts: Any, whole: Any) -> bool | None:
    """Return whether a number is a multiple of another; None where one of them is no number that could be."""
    if not all(isinstance(value, int) and value > 0 for value in (parts, whole)):
        return None
    return bool(whole % parts == 0)


def _groups(params: dict[str, Any]) -> Iterator[str]:
    """Tell of replies that cannot be parted as one of PPO's alternatives compares them, and of pairs that leak."""
    algorithm = _at(params, "ppo.algorithm.name")
    if algorithm not in ALTERNATIVES:
        return
    for path in ("ppo.algorithm.generations", "ppo.algorithm.pairs.generations"):
        yield from _multiple(params, "ppo.episodes", path, "which are the replies to one question")
    if algorithm != "dpo":
        yield from _multiple(params, "ppo.episodes", "ppo.minibatch", "as TRL parts an iteration into equal updates")
    elif _divides(2, _at(params, "ppo.minibatch")) is False:
        yield f"ppo.minibatch: found {_at(params, 'ppo.minibatch')}, but it should be even: dpo learns from pairs"
    for name in ("judge_share", "reads") if _at(params, "ppo.algorithm.pairs.name") == "rankings" else ():
        pairs, judge = _at(params, f"ppo.algorithm.pairs.{name}"), _at(params, f"reward.{name}")
        if None not in (pairs, judge) and pairs != judge:
            yield (
                f"ppo.algorithm.pairs.{name}: found {pairs!r}, but reward.{name} is {judge!r}: make them equal, or the "
                "judge would learn from what the policy learns from"
            )


def _code(params: dict[str, Any]) -> Iterator[str]:
    """Tell of code in sources that there are none of."""
    sources = _at(params, "ingest.sources")
    listed = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    called = {str(source[key]) for source in listed for key in ("name", "group") if source.get(key)}
    wanted = _at(params, "validate.curate.code")
    unknown = [name for name in wanted if name not in called] if isinstance(wanted, list) else []
    if unknown:
        yield (
            f"validate.curate.code: found {', '.join(map(repr, unknown))}, but no source of ingest.sources, nor a "
            f"group of them, is called so; there are {', '.join(sorted(called))}"
        )


def _proximal(params: dict[str, Any]) -> Iterator[str]:
    """Tell of a price of KL that is steered too fast, and of a policy that never learns."""
    horizon, episodes = _at(params, "ppo.algorithm.kl.horizon"), _at(params, "ppo.episodes")
    if isinstance(horizon, int | float) and isinstance(episodes, int) and 0 < horizon < episodes:
        yield (
            f"ppo.algorithm.kl.horizon: found {horizon:g}, but it should be 0, for a fixed price, or at least "
            f"ppo.episodes, which is {episodes}: one iteration would move the price by more than the KL is off"
        )
    warmup, iterations = _at(params, "ppo.algorithm.value_warmup"), _at(params, "ppo.iterations")
    if isinstance(warmup, int) and isinstance(iterations, int) and warmup >= iterations:
        yield (
            f"ppo.algorithm.value_warmup: found {warmup}, but it should be less than ppo.iterations, which is "
            f"{iterations}: the policy would never learn"
        )


def _multiple(params: dict[str, Any], path: str, of: str, why: str) -> Iterator[str]:
    if _divides(_at(params, of), _at(params, path)) is False:
        yield f"{path}: found {_at(params, path)}, but it should be a multiple of {of} ({_at(params, of)}), {why}"


def _shared_out(params: dict[str, Any]) -> Iterator[str]:
    """Tell of what cannot be worked out on a part of the weights, which some engines give each process."""
    engine = _engine(params)
    if engine == "zero3" and _at(params, "numerics.compile") == "always":
        yield (
            "numerics.compile: found 'always', but under the engine zero3 each layer waits for its weights, which "
            "leaves nothing whole to compile: take never or auto, or the engine zero2 or fsdp"
        )
    for section in TRAINING if engine in ZERO else ():
        rule = _at(params, f"{section}.optimizer.name")
        if rule not in ELEMENTWISE:
            yield (
                f"{section}.optimizer.name: found {rule!r}, which works on whole matrices, and the engine {engine} "
                f"gives each process a stretch of them: take {', '.join(ELEMENTWISE)}, or the engine data"
                f"{'' if rule in UNDIVIDED else ' or fsdp'}"
            )
    for section in (*TRAINING, "ppo") if engine in ("fsdp", "tensor") else ():
        rule = _at(params, f"{section}.optimizer.name")
        if rule in UNDIVIDED:
            yield (
                f"{section}.optimizer.name: found {rule!r}, whose rows and columns of second moments need whole "
                f"matrices, and the engine {engine} gives each process a part of them: take another rule, or the "
                "engine data"
            )


def _at(params: Any, path: str) -> Any:
    for name in path.split("."):
        params = params.get(name) if isinstance(params, dict) else None
    return params
