"""Settings: one reading of `params.yaml` reports everything that is wrong with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from tasks.common.consistency import REWARD
from tasks.common.settings import STAGES, Settings, SettingsError, check, read_params
from tests.conftest import ROOT

DEFAULT = ROOT / "profiles" / "default.yaml"


class Example(Settings):
    """A group of settings."""

    rate: float = Field(description="Learning rate", gt=0, le=1)
    steps: int = Field(description="Updates", ge=1)


@pytest.fixture
def params() -> dict[str, Any]:
    """The default profile's settings, to be spoiled."""
    return copy.deepcopy(read_params(DEFAULT))


def problems(params: dict[str, Any]) -> list[str]:
    """Return what `check` finds, one problem a line."""
    with pytest.raises(SettingsError) as failure:
        check(params)
    first, *lines = str(failure.value).splitlines()
    assert first.startswith(f"params.yaml has {len(lines)} problem")
    assert first.endswith("; nothing was run.")
    return [line.strip() for line in lines]


def test_the_default_profile_has_no_problems(params: dict[str, Any]) -> None:
    check(params)


def test_all_problems_are_told_at_once(params: dict[str, Any]) -> None:
    params["base"]["seed"] = -1
    params["numerics"]["thread"] = params["numerics"].pop("threads")
    params["placement"]["side_by_side"] = "two"
    params["mystery"] = {}
    del params["prune"]
    found = problems(params)
    assert len(found) == 6
    for start in (
        "base.seed: found -1, but it should be greater than or equal to 0",
        "numerics.threads: this key is missing",
        "numerics.thread: unknown key",
        "placement.side_by_side: found 'two', but it should be a valid integer",
        "mystery: unknown section",
        "prune: this section is missing",
    ):
        assert any(line.startswith(start) for line in found), (start, found)


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_key_is_found_in_every_stage(params: dict[str, Any], stage: str) -> None:
    params[stage]["no_such_setting"] = 1
    (line,) = problems(params)
    assert line.startswith(f"{stage}.no_such_setting: unknown key")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_without_end_is_no_setting(params: dict[str, Any], value: float) -> None:
    """It has no stable bytes in a record, and would end the stage there."""
    params["ppo"]["alarms"]["kl"] = value
    (line,) = problems(params)
    assert line == f"ppo.alarms.kl: found {value}, but it should be a finite number"


def test_a_section_of_the_wrong_kind_is_told(params: dict[str, Any]) -> None:
    params["ingest"] = ["a", "list"]
    assert any(line.startswith("ingest") for line in problems(params))


def test_the_placement_is_free_but_complete(params: dict[str, Any]) -> None:
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
def test_checkpoints_go_to_an_address_that_is_known(params: dict[str, Any], url: str, rule: str | None) -> None:
    params["placement"]["checkpoints"]["url"] = url
    if rule is None:
        check(params)
    else:
        (line,) = problems(params)
        assert line.startswith(f"placement.checkpoints.url: found '{url}', but {rule}")


def test_what_does_not_fit_between_sections_is_told(params: dict[str, Any]) -> None:
    params["finetune"]["method"] = {"name": "top", "layers": 4}
    params["quantize"]["policy"]["max_new_tokens"] = 39
    found = problems(params)
    assert [line.partition(": found ")[0] for line in found] == [
        "finetune.method.layers", "ppo.max_new_tokens", "prune.max_new_tokens", "evaluate.max_new_tokens",
    ]  # fmt: skip
    assert found[0].endswith("at most pretrain.clm.model.layers, which is 3: the model has no more blocks to train")


def test_a_batch_is_cut_into_equal_parts(params: dict[str, Any]) -> None:
    params["reward"]["accumulate"] = 3
    params["numerics"]["parallel"]["processes"] = 2
    (line,) = problems(params)
    assert line == (
        "reward.batch: found 16, but it should be a multiple of 6: reward.accumulate (3) x "
        "numerics.parallel.processes (2) parts of equal size"
    )


def test_what_deepspeed_cannot_do_is_told(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params["numerics"] |= {"compile": "always", "parallel": {"processes": 2, "engine": "zero3"}}
    found = problems(params)
    assert [line.partition(": found ")[0] for line in found] == ["numerics.compile", "pretrain.clm.optimizer.name"]
    assert "'muon', which works on whole matrices" in found[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else object())
    assert problems(params)[0] == (
        "numerics.parallel.engine: found 'zero3', but deepspeed is not installed: "
        "`pip install -c requirements.lock -e '.[deepspeed]'` brings it"
    )


def test_what_cannot_work_on_a_part_of_the_weights_is_told(params: dict[str, Any]) -> None:
    """Adafactor's rows and columns are of whole matrices; a part of prune's batch without a window makes no pass."""
    rule = params["finetune"]["optimizer"]
    rule |= {"name": "adafactor", "threshold": 1.0}
    del rule["betas"], rule["epsilon"]
    params["prune"]["windows"] = 9
    params["numerics"]["parallel"] = {"processes": 2, "engine": "fsdp"}
    windows, adafactor = problems(params)
    assert windows.startswith("prune.windows: found 9, but under the engine fsdp it should be a multiple of 2")
    assert adafactor.startswith("finetune.optimizer.name: found 'adafactor', whose rows and columns")
    assert adafactor.endswith("take another rule, or the engine data")
    params["numerics"]["parallel"]["engine"] = "zero2"
    assert any("works on whole matrices" in line and line.endswith("or the engine data") for line in problems(params))
    params["numerics"]["parallel"]["engine"] = "data"
    check(params)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp", "tensor"])
def test_one_process_has_no_use_for_an_engine(engine: str, params: dict[str, Any]) -> None:
    """Muon under ZeRO would be wrong with two."""
    params["numerics"]["parallel"] = {"processes": 1, "engine": engine}
    params["reward"] |= {"method": {"name": "head", "layers": 2, "pooling": "model"}, "word_dropout": 0.0}
    check(params)


def test_an_unknown_key_is_told_with_those_beside_it(params: dict[str, Any]) -> None:
    """Those of the choice that was made, where there is one: AdamW has no momentum, and SGD has."""
    params["finetune"]["optimizer"]["momentum"] = 0.9
    params["ingest"]["sources"][0]["colour"] = "red"
    params["numerics"]["parallel"]["workers"] = 2
    assert problems(params) == [
        "numerics.parallel.workers: unknown key (found 2); there are processes, engine",
        "ingest.sources.0.colour: unknown key (found 'red'); there are name, licence, group, kind, requirement, "
        "archive, sha256, reader, members, limit",
        "finetune.optimizer.momentum: unknown key (found 0.9); there are learning_rate, weight_decay, clip, schedule, "
        "betas, epsilon, name",
    ]


@pytest.mark.parametrize(
    "path",
    ["pretrain.clm.window", "pretrain.mlm.window", "finetune.mix.window", "reward.max_tokens",
     "ppo.algorithm.ptx.window", "prune.window", "evaluate.window"],
)  # fmt: skip
def test_nothing_is_read_beyond_the_context(path: str, params: dict[str, Any]) -> None:
    """Models that know 256 positions would take 257 without a word, and answer from a place they never learnt."""
    *sections, name = path.split(".")
    inner = params
    for section in sections:
        inner = inner[section]
    inner[name] = params["tokenize"]["context"]
    check(params)
    inner[name] += 1
    assert problems(params) == [
        f"{path}: found 257, but it should be at most tokenize.context, which is 256: the models read no longer rows"
    ]


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("kl", "horizon", 95, "horizon: found 95, but it should be 0, for a fixed price, or at least ppo.episodes"),
        ("algorithm", "value_warmup", 18, "value_warmup: found 18, but it should be less than ppo.iterations"),
        ("ppo", "max_new_tokens", 65, "max_new_tokens: found 65, but it should be at most reward.max_tokens"),
    ],
)
def test_ppo_neither_steers_too_fast_nor_learns_nothing_nor_says_what_nobody_rates(
    section: str, name: str, value: int, told: str, params: dict[str, Any]
) -> None:
    ppo = params["ppo"]
    inner = {"kl": ppo["algorithm"]["kl"], "algorithm": ppo["algorithm"], "ppo": ppo}[section]
    inner[name] = value
    [found] = problems(params)
    assert told in found
    ppo["algorithm"]["kl"]["horizon"] = ppo["algorithm"]["value_warmup"] = 0
    ppo["max_new_tokens"] = 40
    check(params)


def test_tensor_cuts_matrices_and_not_batches(params: dict[str, Any]) -> None:
    """Three processes read the same 32 windows, but cannot share four heads out."""
    params["numerics"]["parallel"] = {"processes": 3, "engine": "tensor"}
    [found] = problems(params)
    assert found.startswith("pretrain.clm.model.heads: found 4, but under the engine tensor it should be a multiple of")
    params["pretrain"]["clm"]["model"]["heads"] = 3
    check(params)


def test_stages_that_tensor_cannot_cut_are_named_together(params: dict[str, Any]) -> None:
    params["numerics"]["parallel"] = {"processes": 2, "engine": "tensor"}
    check(params, stages=["pretrain@clm", "finetune", "prune"])
    with pytest.raises(SettingsError, match="found 'tensor', but ppo knows data and fsdp"):
        check(params, stages=["pretrain@clm", "finetune", "ppo"])
    with pytest.raises(
        SettingsError, match="found 'tensor', but pretrain@mlm, reward@policy, reward@judge train what it cannot cut"
    ):
        check(params, stages=["pretrain@clm", "pretrain@mlm", "finetune", *REWARD])
    params["finetune"]["method"] = {"name": "adapter", "width": 8}
    with pytest.raises(SettingsError, match="found 'tensor', but finetune trains what it cannot cut"):
        check(params, stages=["finetune"])


def test_ppo_parts_its_replies_among_processes(params: dict[str, Any]) -> None:
    """Equal parts of an iteration's, of an update's, and of the pretraining windows."""
    params["numerics"]["parallel"] = {"processes": 2, "engine": "fsdp"}
    params["ppo"] |= {"episodes": 97, "minibatch": 9}
    found = problems(params)
    assert [line.split(",")[0] for line in found] == ["ppo.episodes: found 97", "ppo.minibatch: found 9"]


def test_code_is_of_sources_that_there_are(params: dict[str, Any]) -> None:
    params["validate"]["curate"]["code"] = ["speeches", "sotu"]  # a group, and the source in it
    check(params)
    params["validate"]["curate"]["code"] = ["programs"]
    [found] = problems(params)
    assert found.startswith("validate.curate.code: found 'programs', but no source of ingest.sources, nor a group")
    assert "sotu, speeches" in found


def test_what_chooses_is_told_as_it_stands_in_the_file(params: dict[str, Any]) -> None:
    """A source's kind is called `kind`; keys that do not go together are named, and not the whole section shown."""
    params["ingest"]["sources"][0]["kind"] = "hf"
    params["finetune"]["model"] = "data/pretrain/mlm/model"
    params["pretrain"]["clm"]["model"]["hidden"] = 100
    kind, width, model = problems(params)
    assert width == ("pretrain.clm.model: hidden (100) must be an even multiple of heads (4), for rotary positions")
    assert kind.startswith("ingest.sources.0.kind: found 'hf', but it should be one of package, files")
    assert model.startswith("finetune: task chat needs the decoder")


def test_a_choice_that_does_not_exist_is_told_with_those_that_do(params: dict[str, Any]) -> None:
    """Where it stands in the file, and what might stand there instead."""
    params["pretrain"]["clm"]["optimizer"]["name"] = "sofia"
    params["ppo"]["optimizer"]["schedule"]["name"] = "step"
    params["finetune"]["method"] = {"name": "prefix", "length": 8}
    params["pretrain"]["mlm"]["masking"]["unit"] = "letter"
    del params["reward"]["ordering"]["name"]
    assert problems(params) == [
        "pretrain.clm.optimizer.name: found 'sofia', but it should be one of sgd, adam, adamw, lamb, muon, lion, "
        "adafactor",
        "pretrain.mlm.masking.unit: found 'letter', but it should be 'token', 'word' or 'span'",
        "finetune.method.name: found 'prefix', but it should be one of full, top, lora, qlora, adapter",
        "reward.ordering.name: this key is missing",
        "ppo.optimizer.schedule.name: found 'step', but it should be one of constant, linear, cosine, wsd",
    ]


def test_what_is_wrong_within_a_choice_is_told_where_it_stands(params: dict[str, Any]) -> None:
    params["prune"]["optimizer"]["momentum"] = 0.9
    params["prune"]["optimizer"]["betas"] = [0.9, 1.5]
    del params["prune"]["optimizer"]["schedule"]["floor"]
    assert sorted(problems(params)) == [
        "prune.optimizer.betas.1: found 1.5, but it should be less than 1",
        "prune.optimizer.momentum: unknown key (found 0.9); there are learning_rate, weight_decay, clip, "
        "schedule, betas, epsilon, name",
        "prune.optimizer.schedule.floor: this key is missing",
    ]


def test_nothing_is_converted_behind_ones_back() -> None:
    with pytest.raises(ValidationError):
        Example.model_validate({"rate": 0.1, "steps": "8"})
    with pytest.raises(ValidationError):
        Example.model_validate({"rate": 0.1, "steps": True})
    assert Example.model_validate({"rate": 1, "steps": 8}).rate == 1.0


def test_settings_cannot_be_changed_after_reading() -> None:
    settings = Example(rate=0.1, steps=8)
    with pytest.raises(ValidationError):
        settings.steps = 9


def test_a_missing_file_says_where_to_go(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="bessemer profile default"):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a: [1", "not valid YAML in UTF-8"),
        (b"a: caf\xe9", "not valid YAML in UTF-8"),
        (b"- a\n- b\n", "must hold one section a stage"),
    ],
)
def test_a_broken_file_is_told(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=found):
        read_params(path)
