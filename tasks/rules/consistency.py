"""Rules between settings that are valid individually, and settings that prevent a stage from running.

Missing values and values of the wrong type are skipped here, because `params_file.check` reports them. Rules between
entries and their models are in `models.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tasks.common import model_graph
from tasks.common.model_graph import Params, lookup
from tasks.common.settings import LOCKSTEP_ENGINES, ZERO_STAGES
from tasks.rules import data, gates, models, user_models
from tasks.rules.models import Entry, check_at_most, entries

ENGINE_KEY = "numerics.parallel.engine"
PROCESSES_KEY = "numerics.parallel.processes"
TRAINING_STAGES = ("pretrain", "finetune", "reward", "prune")
REQUIREMENTS = (  # stage, setting, value, the setting that it requires, the required value, why
    ("finetune", "method.name", "qlora", "numerics.device", "cuda", "it computes on four-bit weights, on a GPU"),
    ("finetune", "method.name", "qlora", ENGINE_KEY, "data", "four-bit weights cannot be sharded"),
    ("reward", "method.name", "head", ENGINE_KEY, "data", "a single layer is not worth sharding"),
    ("align", "rollouts.name", "vllm", PROCESSES_KEY, 1, "only one process can send its weights to vLLM"),
    ("align", "rollouts.name", "vllm", "algorithm.name", "ppo", "TRL's trainers take replies of our own sampler"),
    ("align", "reward.name", "rankings", "algorithm.name", "dpo", "only DPO learns from pairs without a reward model"),
    ("pretrain", "model.name", "from", "tokenize.tokenizer.name", "from", "a model works only with its own tokenizer"),
)  # fmt: skip
ELEMENTWISE_OPTIMIZERS = ("sgd", "adam", "adamw", "lion")  # their updates work on any shard of a matrix
WHOLE_MATRIX_OPTIMIZERS = ("adafactor",)  # torch's implementation does not support sharded matrices
TRL_ALGORITHMS = ("dpo", "rloo", "grpo")


def check_settings(params: Params) -> Iterator[str]:
    """Report settings that contradict each other; the graph must have no cycles."""
    yield from user_models.check_user_models(params)
    yield from models.check_models(params)
    yield from data.check_data(params)
    for entry in entries(params):
        yield from _check_requirements(entry, params)
    yield from _check_curated_sources(params)
    for entry in entries(params, "align"):
        yield from _check_ppo(entry)
        yield from _check_reply_groups(entry)
    for entry in entries(params, *TRAINING_STAGES):
        yield from _check_batches(entry, params)
    for entry in entries(params, "align"):
        yield from _check_reply_counts(entry, params)
    yield from _check_sharding(params)
    yield from gates.check_evaluations(params)
    yield from gates.check_gates(params)


def check_stages(params: Params, stages: Iterable[str]) -> Iterator[str]:
    """Report settings that prevent some of the given stages from running but are valid for others."""
    wanted = list(stages)
    yield from model_graph.check_user_paths(params, wanted)
    if "compare" in wanted:
        yield from gates.check_keys(params)
    if "ingest" in wanted:
        yield from data.check_source_files(params)
    unsupported = [
        f"{stage}@{where.partition('.')[2]}"
        for stage, where, entry in entries(params)
        if _lacks_tensor_parallel(stage, entry)
    ]
    names = [stage for stage in wanted if stage in unsupported]
    if _engine(params) == "tensor" and names:
        yield (
            f"{ENGINE_KEY}: found 'tensor', but {', '.join(names)} train{'s' * (len(names) == 1)} what it does not "
            "support: an encoder, a head, low-rank updates or adapters. Use data, fsdp or a ZeRO engine, or run other "
            "stages"
        )
    for _, where, entry in entries(params, "align"):
        if where.replace(".", "@") not in wanted:
            continue
        if _engine(params) in ("tensor", *ZERO_STAGES):
            yield (
                f"{ENGINE_KEY}: found {_engine(params)!r}, but {where.replace('.', '@')} supports only data and fsdp: "
                "it samples between two updates, which needs a torch model"
            )
        algorithm, processes = lookup(entry, "algorithm.name"), lookup(params, "numerics.parallel.processes")
        if algorithm in TRL_ALGORITHMS and processes != 1:
            yield (
                f"{where}.algorithm.name: found {algorithm!r}, which trains in one process, but "
                f"numerics.parallel.processes is {processes}: set that to 1, or use ppo, which allows several"
            )


def _lacks_tensor_parallel(stage: str, entry: Any) -> bool:
    """Return whether an entry trains a model or a method that the engine `tensor` does not support."""
    plain = lookup(entry, "method.name") in ("full", "top_layers") and lookup(entry, "task.name") == "chat"
    masked = stage == "pretrain" and lookup(entry, "objective") == "masked"
    return masked or stage == "reward" or (stage == "finetune" and not plain)


def _engine(params: Params) -> Any:
    """Return the parallel engine; None for one process."""
    return None if lookup(params, PROCESSES_KEY) == 1 else lookup(params, ENGINE_KEY)


def _check_requirements(entry: Entry, params: Params) -> Iterator[str]:
    stage, where, content = entry
    for owner, setting, value, other, needed, why in REQUIREMENTS:
        shared = other.partition(".")[0] in params
        found, path = (lookup(params, other), other) if shared else (lookup(content, other), f"{where}.{other}")
        unused = other == ENGINE_KEY and _engine(params) is None  # one process has no engine
        if stage == owner and lookup(content, setting) == value and found != needed and not unused:
            yield f"{where}.{setting}: found {value!r}, which needs {path} to be {needed} (it is {found}): {why}"


def _check_batches(entry: Entry, params: Params) -> Iterator[str]:
    """Report batches (under `tensor`, matrices) that cannot be split evenly between the processes."""
    stage, where, content = entry
    processes, engine = lookup(params, PROCESSES_KEY), _engine(params)
    sharded = stage == "pretrain" and engine == "tensor" and lookup(content, "objective") == "causal"
    for name in ("heads", "feed_forward") if sharded and lookup(content, "model.name") == "new" else ():
        if _divides(processes, lookup(content, f"model.{name}")) is False:
            yield (
                f"{where}.model.{name}: found {lookup(content, f'model.{name}')}, but under the engine tensor it should"
                f" be a multiple of {PROCESSES_KEY} ({processes}), because each process holds an equal part of every "
                "block"
            )
    batch, steps = lookup(content, "batch"), lookup(content, "gradient_accumulation_steps")
    factors, parts = f"{where}.gradient_accumulation_steps ({steps})", steps
    if engine != "tensor" and isinstance(steps, int) and isinstance(processes, int):
        factors, parts = f"{factors} x {PROCESSES_KEY} ({processes})", steps * processes
    if _divides(parts, batch) is False:
        yield f"{where}.batch: found {batch}, but it should be a multiple of {parts}: {factors} parts of equal size"
    windows = lookup(content, "windows")
    if engine in LOCKSTEP_ENGINES and _divides(parts, windows) is False:
        yield (
            f"{where}.windows: found {windows}, but under the engine {engine} it should be a multiple of {parts}, "
            f"{factors}: the processes wait for each other, so all must run the same number of passes"
        )


def _check_reply_counts(entry: Entry, params: Params) -> Iterator[str]:
    """Report numbers of replies that cannot be split evenly between the processes of an alignment, or are too small."""
    _, where, content = entry
    why = "a minibatch is a part of an iteration's replies"
    limit = f"{where}.episodes", lookup(content, "episodes")
    yield from check_at_most(f"{where}.minibatch", lookup(content, "minibatch"), *limit, why)
    names = ("episodes", "minibatch", "algorithm.ptx.batch") if _engine(params) in ("data", "fsdp") else ()
    for name in names:
        if _divides(lookup(params, PROCESSES_KEY), lookup(content, name)) is False:
            yield (
                f"{where}.{name}: found {lookup(content, name)}, but it should be a multiple of {PROCESSES_KEY} "
                f"({lookup(params, PROCESSES_KEY)}), because each process takes an equal part"
            )


def _divides(parts: Any, whole: Any) -> bool | None:
    """Return whether `whole` is a multiple of `parts`; None unless both are positive integers."""
    if not all(isinstance(value, int) and value > 0 for value in (parts, whole)):
        return None
    return bool(whole % parts == 0)


def _check_reply_groups(entry: Entry) -> Iterator[str]:
    """Report numbers of replies that cannot be grouped as DPO, RLOO or GRPO compares them."""
    _, where, content = entry
    algorithm = lookup(content, "algorithm.name")
    if algorithm not in TRL_ALGORITHMS:
        return
    if lookup(content, "reward.name") != "rankings":
        why = "which are the replies to one question"
        yield from _check_multiple(entry, "episodes", "algorithm.generations", why)
    if algorithm != "dpo":
        yield from _check_multiple(entry, "episodes", "minibatch", "as TRL splits an iteration into equal updates")
    elif _divides(2, lookup(content, "minibatch")) is False:
        yield f"{where}.minibatch: found {lookup(content, 'minibatch')}, but it should be even: dpo learns from pairs"


def _check_multiple(entry: Entry, of: str, name: str, why: str) -> Iterator[str]:
    _, where, content = entry
    if _divides(lookup(content, name), lookup(content, of)) is False:
        yield (
            f"{where}.{of}: found {lookup(content, of)}, but it should be a multiple of {where}.{name} "
            f"({lookup(content, name)}), {why}"
        )


def _check_ppo(entry: Entry) -> Iterator[str]:
    """Report a KL coefficient that adapts too fast, and a critic warm-up that leaves no iteration for the policy."""
    _, where, content = entry
    horizon, episodes = lookup(content, "algorithm.kl.horizon"), lookup(content, "episodes")
    if isinstance(horizon, int | float) and isinstance(episodes, int) and 0 < horizon < episodes:
        yield (
            f"{where}.algorithm.kl.horizon: found {horizon:g}, but it should be 0, for a fixed coefficient, or at "
            f"least {where}.episodes, which is {episodes}: one iteration would change the coefficient by more than the "
            "KL's error"
        )
    warmup, iterations = lookup(content, "algorithm.critic_warmup_iterations"), lookup(content, "iterations")
    if isinstance(warmup, int) and isinstance(iterations, int) and warmup >= iterations:
        yield (
            f"{where}.algorithm.critic_warmup_iterations: found {warmup}, but it should be less than "
            f"{where}.iterations, which is {iterations}: the policy would never learn"
        )


def _check_curated_sources(params: Params) -> Iterator[str]:
    """Report names in `validate.curate.code` and `languages` that are neither a source nor a group."""
    sources = lookup(params, "ingest.sources")
    listed = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    known = {str(source[key]) for source in listed for key in ("name", "group") if source.get(key)}
    for setting in ("code", "languages"):
        names = lookup(params, f"validate.curate.{setting}")
        unknown = [name for name in names if name not in known] if isinstance(names, list | dict) else []
        if unknown:
            yield (
                f"validate.curate.{setting}: found {', '.join(map(repr, unknown))}, but no source or group of "
                f"ingest.sources has this name; there are {', '.join(sorted(known))}"
            )


def _check_sharding(params: Params) -> Iterator[str]:
    """Report settings that do not work with sharded weights."""
    engine = _engine(params)
    if engine == "zero3" and lookup(params, "numerics.compile") == "always":
        yield (
            "numerics.compile: found 'always', but under the engine zero3 each layer waits for its weights, so no "
            "graph can be compiled: use never or auto, or the engine zero2 or fsdp"
        )
    for _, where, content in entries(params, *TRAINING_STAGES) if engine in ZERO_STAGES else ():
        rule = lookup(content, "optimizer.name")
        if rule not in ELEMENTWISE_OPTIMIZERS:
            yield (
                f"{where}.optimizer.name: found {rule!r}, which works on whole matrices, but the engine {engine} "
                f"flattens and shards them: use {', '.join(ELEMENTWISE_OPTIMIZERS)}, or the engine data"
                f"{'' if rule in WHOLE_MATRIX_OPTIMIZERS else ' or fsdp'}"
            )
    for _, where, content in entries(params, *TRAINING_STAGES, "align") if engine in ("fsdp", "tensor") else ():
        rule = lookup(content, "optimizer.name")
        if rule in WHOLE_MATRIX_OPTIMIZERS:
            yield (
                f"{where}.optimizer.name: found {rule!r}, whose factored second moments need whole matrices, but the "
                f"engine {engine} shards them: use another optimizer, or the engine data"
            )
