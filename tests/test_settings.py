"""Settings: one check of `params.yaml` reports all of its problems."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from tasks.common.defaults import default_of, read_settings, sections, settings_classes, with_defaults
from tasks.common.params_file import check
from tasks.common.raw_params import read_params
from tasks.common.settings import ENTRY_SECTIONS, ENTRY_STAGES, STAGES, Settings, SettingsError
from tests.conftest import ROOT

DEFAULT = ROOT / "profiles" / "default.yaml"


class Example(Settings):
    """A group of settings."""

    rate: float = Field(description="Learning rate", gt=0, le=1)
    steps: int = Field(description="Updates", ge=1)


@pytest.fixture
def params() -> dict[str, Any]:
    """The default profile's settings, for tests to break."""
    # A copy through JSON: entries of the file share parts, and a test changes only one entry.
    copy: dict[str, Any] = json.loads(json.dumps(read_settings(DEFAULT)))
    return copy


def problems(params: dict[str, Any]) -> list[str]:
    """Return the problems that `check` reports, one per line."""
    with pytest.raises(SettingsError) as failure:
        check(params)
    first, *lines = str(failure.value).splitlines()
    assert first.startswith(f"params.yaml has {len(lines)} problem")
    assert first.endswith("; nothing was run.")
    return [line.strip() for line in lines]


def test_the_default_profile_has_no_problems(params: dict[str, Any]) -> None:
    check(params)


def test_all_problems_are_reported_at_once(params: dict[str, Any]) -> None:
    params["base"]["seed"] = -1
    params["numerics"]["thread"] = params["numerics"].pop("threads")
    del params["pretrain"]["causal"]["steps"]
    params["placement"]["max_parallel_stages"] = "two"
    params["mystery"] = {}
    del params["package"]
    messages = problems(params)
    assert len(messages) == 6
    for start in (
        "base.seed: found -1, but it should be greater than or equal to 0",
        "pretrain.causal.steps: this key is missing",
        "numerics.thread: unknown key",
        "placement.max_parallel_stages: found 'two', but it should be a valid integer",
        "mystery: unknown section",
        "package: this section is missing",
    ):
        assert any(line.startswith(start) for line in messages), (start, messages)


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_key_is_found_in_every_stage(params: dict[str, Any], stage: str) -> None:
    where, section = (
        (stage, params[stage])
        if stage not in ENTRY_STAGES
        else next((f"{stage}.{key}", entry) for key, entry in params[stage].items())
    )
    section["no_such_setting"] = 1
    (line,) = problems(params)
    assert line.startswith(f"{where}.no_such_setting: unknown key")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_number_is_rejected(params: dict[str, Any], value: float) -> None:
    """It has no stable bytes in a record and would fail there."""
    params["align"]["policy"]["alarms"]["max_kl"] = value
    (line,) = problems(params)
    assert line == f"align.policy.alarms.max_kl: found {value}, but it should be a finite number"


def test_section_of_the_wrong_type_is_reported(params: dict[str, Any]) -> None:
    params["ingest"] = ["a", "list"]
    assert any(line.startswith("ingest") for line in problems(params))


def test_checkpoint_url_may_change_but_not_be_empty(params: dict[str, Any]) -> None:
    params["placement"]["checkpoints"]["url"] = "memory://somewhere/else"
    check(params)
    params["placement"]["checkpoints"]["url"] = ""
    (line,) = problems(params)
    assert line.startswith("placement.checkpoints.url: found ''")


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("checkpoints", None),
        ("/mnt/shared/checkpoints", None),
        ("simplecache::file:///mnt/shared", None),
        ("memory://", None),
        ("s4://bucket/folder", "fsspec knows no scheme 's4'"),
        ("simplecash::file:///mnt/shared", "fsspec knows no scheme 'simplecash'"),
        ("dropbox://folder", "dropbox:// needs a package that is not installed"),
    ],
)
def test_checkpoint_url_is_accepted_or_reported(params: dict[str, Any], url: str, rule: str | None) -> None:
    params["placement"]["checkpoints"]["url"] = url
    if rule is None:
        check(params)
    else:
        (line,) = problems(params)
        assert line.startswith(f"placement.checkpoints.url: found '{url}', but {rule}")


def test_contradictions_between_sections_are_reported(params: dict[str, Any]) -> None:
    params["finetune"]["chat"]["method"] = {"name": "top_layers", "layers": 4}
    params["quantize"]["chat"]["max_new_tokens"] = 39
    messages = problems(params)
    assert [line.partition(": found ")[0] for line in messages] == [
        "finetune.chat.method.layers", "evaluate.chat.max_new_tokens", "prune.pruned.max_new_tokens",
        "align.policy.max_new_tokens",
    ]  # fmt: skip
    assert messages[0].endswith(
        "at most pretrain.causal.model.layers, which is 3: the model has no more blocks to train"
    )


def test_a_batch_is_cut_into_equal_parts(params: dict[str, Any]) -> None:
    params["reward"]["train"]["gradient_accumulation_steps"] = 3
    params["numerics"]["parallel"]["processes"] = 2
    (line,) = problems(params)
    assert line == (
        "reward.train.batch: found 16, but it should be a multiple of 6: "
        "reward.train.gradient_accumulation_steps (3) x numerics.parallel.processes (2) parts of equal size"
    )


def test_unsupported_settings_under_deepspeed_are_reported(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params["numerics"] |= {"compile": "always", "parallel": {"processes": 2, "engine": "zero3"}}
    messages = problems(params)
    assert [line.partition(": found ")[0] for line in messages] == [
        "numerics.compile",
        "pretrain.causal.optimizer.name",
    ]
    assert "'muon', which works on whole matrices" in messages[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else object())
    assert problems(params)[0] == (
        "numerics.parallel.engine: found 'zero3', but deepspeed is not installed: "
        "install it with `pip install -c requirements.lock deepspeed`"
    )


def test_optimizers_that_need_whole_matrices_are_reported(params: dict[str, Any]) -> None:
    """Adafactor needs whole matrices; prune needs a window in every process's part of the batch."""
    rule = params["finetune"]["chat"]["optimizer"]
    rule |= {"name": "adafactor", "threshold": 1.0}
    del rule["betas"], rule["epsilon"]
    params["prune"]["pruned"]["windows"] = 9
    params["numerics"]["parallel"] = {"processes": 2, "engine": "fsdp"}
    windows, adafactor = problems(params)
    assert windows.startswith("prune.pruned.windows: found 9, but under the engine fsdp it should be a multiple of 2")
    assert adafactor.startswith("finetune.chat.optimizer.name: found 'adafactor', whose factored second moments")
    assert adafactor.endswith("use another optimizer, or the engine data")
    params["numerics"]["parallel"]["engine"] = "zero2"
    assert any("works on whole matrices" in line and line.endswith("or the engine data") for line in problems(params))
    params["numerics"]["parallel"]["engine"] = "data"
    check(params)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp", "tensor"])
def test_engine_is_ignored_with_one_process(engine: str, params: dict[str, Any]) -> None:
    """With two processes, Muon under ZeRO would be an error."""
    params["numerics"]["parallel"] = {"processes": 1, "engine": engine}
    params["reward"]["train"] |= {"method": {"name": "head", "layers": 2, "pooling": "model"}, "word_dropout": 0.0}
    check(params)


def test_unknown_key_lists_known_keys(params: dict[str, Any]) -> None:
    """In a union, only the keys of the chosen class are listed: AdamW has no momentum, SGD has."""
    params["finetune"]["chat"]["optimizer"]["momentum"] = 0.9
    params["ingest"]["sources"][0]["colour"] = "red"
    params["numerics"]["parallel"]["workers"] = 2
    assert problems(params) == [
        "numerics.parallel.workers: unknown key (found 2); there are processes, engine",
        "ingest.sources.0.colour: unknown key (found 'red'); there are name, licence, group, kind, requirement, "
        "archive, sha256, reader, members, limit",
        "finetune.chat.optimizer.momentum: unknown key (found 0.9); there are learning_rate, weight_decay, "
        "max_grad_norm, schedule, betas, epsilon, name",
    ]


@pytest.mark.parametrize(
    "path",
    ["pretrain.causal.window", "pretrain.masked.window", "finetune.chat.pretraining_mix.window",
     "reward.train.max_tokens", "align.policy.algorithm.ptx.window", "prune.pruned.window", "evaluations.text.window"],
)  # fmt: skip
def test_windows_longer_than_the_context_are_reported(path: str, params: dict[str, Any]) -> None:
    """Models with 256 positions would accept 257 silently and use an untrained position."""
    *sections, name = path.split(".")
    inner = params
    for section in sections:
        inner = inner[section]
    inner[name] = params["tokenize"]["context"]
    check(params)
    inner[name] += 1
    assert problems(params) == [
        f"{path}: found 257, but it should be at most tokenize.context, which is 256: the model's context is no longer"
    ]


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        (
            "kl",
            "horizon",
            95,
            "horizon: found 95, but it should be 0, for a fixed coefficient, or at least align.policy.episodes",
        ),
        (
            "algorithm",
            "critic_warmup_iterations",
            18,
            "critic_warmup_iterations: found 18, but it should be less than align.policy.iterations",
        ),
        ("align", "max_new_tokens", 65, "max_new_tokens: found 65, but it should be at most reward.train.max_tokens"),
    ],
)
def test_ppo_limits_of_horizon_warmup_and_reply_length(
    section: str, name: str, value: int, expected: str, params: dict[str, Any]
) -> None:
    ppo = params["align"]["policy"]
    inner = {"kl": ppo["algorithm"]["kl"], "algorithm": ppo["algorithm"], "align": ppo}[section]
    inner[name] = value
    [message] = problems(params)
    assert expected in message
    ppo["algorithm"]["kl"]["horizon"] = ppo["algorithm"]["critic_warmup_iterations"] = 0
    ppo["max_new_tokens"] = 40
    check(params)


def test_tensor_parallel_splits_matrices_not_batches(params: dict[str, Any]) -> None:
    """Three processes can read the same 32 windows but cannot split four heads."""
    params["numerics"]["parallel"] = {"processes": 3, "engine": "tensor"}
    [message] = problems(params)
    assert message.startswith(
        "pretrain.causal.model.heads: found 4, but under the engine tensor it should be a multiple of"
    )
    params["pretrain"]["causal"]["model"]["heads"] = 3
    check(params)


def test_stages_without_tensor_parallel_are_listed(params: dict[str, Any]) -> None:
    params["numerics"]["parallel"] = {"processes": 2, "engine": "tensor"}
    check(params, stages=["pretrain@causal", "finetune@chat", "prune@pruned"])
    with pytest.raises(SettingsError, match="found 'tensor', but align@policy supports only data and fsdp"):
        check(params, stages=["pretrain@causal", "finetune@chat", "align@policy"])
    with pytest.raises(
        SettingsError,
        match="found 'tensor', but pretrain@masked, reward@train, reward@judge train what it does not support",
    ):
        check(params, stages=["pretrain@causal", "pretrain@masked", "reward@train", "reward@judge"])
    params["finetune"]["chat"]["method"] = {"name": "adapter", "width": 8}
    with pytest.raises(SettingsError, match="found 'tensor', but finetune@chat trains what it does not support"):
        check(params, stages=["finetune@chat"])


def test_ppo_batch_sizes_are_multiples_of_processes(params: dict[str, Any]) -> None:
    """An iteration's episodes, an update's minibatch and the pretraining windows must divide evenly."""
    params["numerics"]["parallel"] = {"processes": 2, "engine": "fsdp"}
    params["align"]["policy"] |= {"episodes": 97, "minibatch": 9}
    messages = problems(params)
    assert [line.split(",")[0] for line in messages] == [
        "align.policy.episodes: found 97",
        "align.policy.minibatch: found 9",
    ]


def test_code_of_unknown_sources_is_reported(params: dict[str, Any]) -> None:
    params["validate"]["curate"]["code"] = ["speeches", "sotu"]  # a group, and the source in it
    check(params)
    params["validate"]["curate"]["code"] = ["programs"]
    [message] = problems(params)
    assert message.startswith("validate.curate.code: found 'programs', but no source or group of ingest.sources")
    assert "sotu, speeches" in message


def test_discriminator_problems_use_the_keys_of_the_file(params: dict[str, Any]) -> None:
    """A source's discriminator is `kind`; contradicting keys are named instead of printing the whole section."""
    params["ingest"]["sources"][0]["kind"] = "hf"
    params["finetune"]["chat"]["model"] = "data/pretrain/masked/model"
    params["pretrain"]["causal"]["model"]["hidden"] = 100
    kind, width, model = problems(params)[:3]
    assert width == ("pretrain.causal.model: hidden (100) must be an even multiple of heads (4), for rotary positions")
    assert kind.startswith("ingest.sources.0.kind: found 'hf', but it should be one of package, files")
    assert model == (
        "finetune.chat.model: found 'data/pretrain/masked/model', a masked model, but the task chat needs a causal one"
    )


def test_unknown_choice_lists_the_known_ones(params: dict[str, Any]) -> None:
    """The message has the path in the file and the allowed values."""
    params["pretrain"]["causal"]["optimizer"]["name"] = "sofia"
    params["align"]["policy"]["optimizer"]["schedule"]["name"] = "step"
    params["finetune"]["chat"]["method"] = {"name": "prefix", "length": 8}
    params["pretrain"]["masked"]["masking"]["unit"] = "letter"
    del params["reward"]["train"]["ordering"]["name"]
    assert problems(params) == [
        "pretrain.causal.optimizer.name: found 'sofia', but it should be one of sgd, adam, adamw, lamb, muon, lion, "
        "adafactor",
        "pretrain.masked.masking.unit: found 'letter', but it should be 'token', 'word' or 'span'",
        "finetune.chat.method.name: found 'prefix', but it should be one of full, top_layers, lora, qlora, adapter",
        "reward.train.ordering.name: this key is missing",
        "align.policy.optimizer.schedule.name: found 'step', but it should be one of constant, linear, cosine, wsd",
    ]


def test_problem_within_a_choice_has_its_path(params: dict[str, Any]) -> None:
    params["prune"]["pruned"]["optimizer"]["momentum"] = 0.9
    params["prune"]["pruned"]["optimizer"]["betas"] = [0.9, 1.5]
    del params["prune"]["pruned"]["optimizer"]["learning_rate"]
    assert sorted(problems(params)) == [
        "prune.pruned.optimizer.betas.1: found 1.5, but it should be less than 1",
        "prune.pruned.optimizer.learning_rate: this key is missing",
        "prune.pruned.optimizer.momentum: unknown key (found 0.9); there are learning_rate, weight_decay, "
        "max_grad_norm, schedule, betas, epsilon, name",
    ]


def test_a_default_contradicts_like_a_written_value(params: dict[str, Any]) -> None:
    del params["finetune"]["chat"]["pretraining_mix"]["window"]
    params["tokenize"]["context"] = 32
    messages = problems(params)
    start = "finetune.chat.pretraining_mix.window: found 64, but it should be at most tokenize.context, which is 32"
    assert any(line.startswith(start) for line in messages)


def test_omitted_settings_have_class_defaults() -> None:
    written = read_params(DEFAULT)
    settings = with_defaults(written)
    assert "weight_decay" not in written["finetune"]["chat"]["optimizer"]
    assert settings["finetune"]["chat"]["optimizer"] == {
        "name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01, "max_grad_norm": 1.0, "betas": [0.9, 0.98],
        "epsilon": 1e-9, "schedule": {"name": "cosine", "warmup": 0.05, "floor": 0.1},
    }  # fmt: skip
    assert settings["ingest"]["sources"][0]["limit"] is None  # within a list
    assert settings["align"]["policy"]["algorithm"]["kl"]["estimator"] == "k1"  # within a choice, beside written keys
    assert with_defaults(settings) == settings


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_defaults_filled_in_are_those_that_stages_get(path: Path) -> None:
    """The filled-in defaults equal those of the stage's class."""
    written, settings = read_params(path), read_settings(path)
    for section, kind in sections().items():
        raw, full = (
            content[section] if section in ENTRY_SECTIONS else {"": content[section]} for content in (written, settings)
        )
        for name in raw:
            stage_config, filled_config = (TypeAdapter(kind).validate_python(part[name]) for part in (raw, full))
            assert stage_config.model_dump(mode="json") == filled_config.model_dump(mode="json")
            assert filled_config.model_fields_set == set(type(filled_config).model_fields), (section, name)


def every_group(kind: type[Settings]) -> Iterator[type[Settings]]:
    """Yield a class of settings and all classes nested in it."""
    yield kind
    for field in kind.model_fields.values():
        for inner in settings_classes(field.annotation):
            yield from every_group(inner)


@pytest.mark.parametrize("section", sections())
def test_every_default_is_within_its_bounds(section: str) -> None:
    kinds = settings_classes(sections()[section])
    for group in dict.fromkeys(inner for kind in kinds for inner in every_group(kind)):
        written = {name: default_of(field) for name, field in group.model_fields.items() if not field.is_required()}
        with pytest.raises(ValidationError) as error:
            group.model_validate({**written, "nothing": 0})
        assert {problem["type"] for problem in error.value.errors()} <= {"missing", "extra_forbidden"}, group


def test_types_are_not_converted() -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({"rate": 0.1, "steps": "8"})
    with pytest.raises(ValidationError):
        Example.model_validate({"rate": 0.1, "steps": True})
    assert Example.model_validate({"rate": 1, "steps": 8}).rate == 1.0


def test_settings_cannot_be_changed_after_reading() -> None:
    settings = Example(rate=0.1, steps=8)
    with pytest.raises(ValidationError):
        settings.steps = 9


def test_missing_params_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="bessemer profile default"):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "not valid YAML in UTF-8"),
        (b"a: caf\xe9", "not valid YAML in UTF-8"),
        (b"- a\n- b\n", "must hold one section per stage"),
    ],
)
def test_broken_file_is_reported(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=expected):
        read_params(path)
