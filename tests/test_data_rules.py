"""Settings against the sources: what no source provides is reported before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from flows import commands, graph
from tasks.common.defaults import read_settings
from tasks.common.params_file import check
from tasks.common.settings import SettingsError
from tests.conftest import ROOT


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The smoke profile's settings in the repository, where its files are."""
    monkeypatch.chdir(ROOT)
    copy: dict[str, Any] = json.loads(json.dumps(read_settings(ROOT / "profiles/smoke.yaml")))
    return copy


def problems(params: dict[str, Any], *stages: str) -> list[str]:
    with pytest.raises(SettingsError) as failure:
        check(params, stages=stages)
    return [line.strip() for line in str(failure.value).splitlines()[1:]]


def without(params: dict[str, Any], *names: str) -> None:
    """Remove sources by name."""
    sources = params["ingest"]["sources"]
    params["ingest"]["sources"] = [source for source in sources if source["name"] not in names]


def test_mixture_of_an_unknown_kind_lists_the_kinds_of_text(params: dict[str, Any]) -> None:
    params["pretrain"]["causal"]["mixture"] = {"statements": 0.5, "wiki": 0.5}
    (line,) = problems(params)
    assert line == (
        "pretrain.causal.mixture: found 'wiki', but no source provides such documents; there are statements, prose, "
        "facts, reference, stories, fiction, ratings, reviews"
    )


def test_mixture_may_name_a_source_by_its_default_name(params: dict[str, Any]) -> None:
    """It is made from the source's path."""
    params["ingest"]["sources"].append({"kind": "files", "path": "stories", "table": "corpus"})
    params["pretrain"]["causal"]["mixture"] = {"stories-2": 1.0}
    check(params)


def test_mixture_of_statements_without_facts_is_a_problem(params: dict[str, Any]) -> None:
    without(params, "facts")
    assert any(
        line.startswith("pretrain.causal.mixture: found 'statements', but no source provides such documents (documents")
        for line in problems(params)
    )


def test_sources_of_an_entry_must_provide_conversations(params: dict[str, Any]) -> None:
    params["finetune"]["chat"]["sources"] = ["nobody"]
    params["evaluate"]["tuned"]["sources"] = ["facts", "ratings"]
    unknown, wrong = problems(params)
    assert unknown.startswith(
        "finetune.chat.sources.0: found 'nobody', but no source in ingest.sources has this name; those with "
        "conversations are facts"
    )
    assert wrong.startswith(
        "evaluate.tuned.sources.1: found 'ratings', but this source provides no conversations (table instructions); "
    )


def test_mixture_that_is_not_read_may_name_anything(params: dict[str, Any]) -> None:
    params["finetune"]["chat"]["pretraining_mix"] = {"weight": 0.0, "mixture": {"wiki": 1.0}}
    check(params)


def test_reward_model_without_rankings_is_a_problem(params: dict[str, Any]) -> None:
    """The folder of people's rankings is empty."""
    without(params, "ratings")
    found = [line for line in problems(params) if line.startswith("reward.")]
    assert found == [
        f"reward.{role}: it learns from rankings or preference pairs (table rankings), but no source in ingest.sources "
        "provides any: add one"
        for role in ("train", "judge")
    ]


def test_dpo_on_rankings_needs_no_conversations(params: dict[str, Any]) -> None:
    """The table that an alignment learns from depends on its reward."""
    without(params, "facts", "smalltalk")
    params["align"]["policy"]["reward"] = {"name": "rankings", "path": "data/validate/rankings"}
    params["align"]["policy"]["algorithm"] = {"name": "dpo"}
    lines = problems(params)
    assert any(line.startswith("finetune.chat: it learns from conversations") for line in lines)
    assert not any(line.startswith("align.policy: it learns from") for line in lines)


def test_missing_source_file_is_named(params: dict[str, Any]) -> None:
    params["ingest"]["sources"][0]["path"] = "nowhere.csv"
    check(params)
    params["ingest"]["wordings"] = "nowhere.yaml"
    source, wordings = problems(params, "ingest")
    assert source.startswith("ingest.sources.0, source facts: expected a file at data/sources/nowhere.csv, a folder")
    assert wordings.startswith("ingest.wordings: found 'nowhere.yaml', but there is no file data/sources/nowhere.yaml")


def test_wrong_settings_and_missing_files_are_reported_at_once(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before DVC is asked, which takes seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(graph, "read", None)
    params["finetune"]["chat"] |= {"model": "models/nowhere", "stepz": 3}
    (tmp_path / "params.yaml").write_text(json.dumps(params), encoding="utf-8")
    with pytest.raises(SettingsError) as failure:
        commands.plan(tmp_path, ())
    text = str(failure.value)
    assert "finetune.chat.stepz: unknown key" in text
    assert "finetune.chat.model: found 'models/nowhere', but there is no such file or folder here" in text
    assert "ingest.sources.0, source facts: expected a file at data/sources/smoke/facts.csv" in text


def test_unreadable_and_empty_source_files_are_named(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What opening a file shows is reported before ingest starts, for all sources at once."""
    files = {"image.jsonl": b"\x89PNG\r\n", "empty.jsonl": b"", "torn.json": b'[{"text"', "odd.csv": b"utterance\nHi\n"}
    (tmp_path / "data/sources").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "data/sources" / name).write_bytes(content)
    params["ingest"] |= {
        "sources": [{"kind": "files", "path": name} for name in files],
        "wordings": None,
        "names": None,
    }
    monkeypatch.chdir(tmp_path)
    lines = [line for line in problems(params, "ingest") if line.startswith("ingest.sources.")]
    assert [line.partition(":")[0] for line in lines] == [
        f"ingest.sources.{number}, source {name.partition('.')[0]}" for number, name in enumerate(files)
    ]


def test_source_without_a_table_is_ruled_out_only_by_its_settings(params: dict[str, Any]) -> None:
    """Nobody knows yet what a remote file holds; its columns may say."""
    without(params, "ratings")
    remote: dict[str, Any] = {"kind": "remote", "files": [{"url": "s3://bucket/a.jsonl", "sha256": "0" * 64}]}
    params["ingest"]["sources"].append(remote)
    check(params)
    remote["columns"] = {"messages": "turns"}
    assert any(line.startswith("reward.train: it learns from rankings") for line in problems(params))


@pytest.mark.parametrize(
    ("stage", "key", "changes", "setting"),
    [
        ("pretrain", "causal", {"batch": 4}, "mixture"),
        ("prune", "pruned", {"windows": 4}, "mixture"),
        ("finetune", "chat", {"pretraining_mix": {"weight": 1.0, "batch": 4}}, "pretraining_mix.mixture"),
    ],
)
def test_share_of_less_than_one_window_is_a_problem(
    stage: str, key: str, changes: dict[str, Any], setting: str, params: dict[str, Any]
) -> None:
    mixture = {"statements": 0.9, "prose": 0.1}
    entry = params[stage][key] | changes
    if stage == "finetune":
        entry["pretraining_mix"]["mixture"] = mixture
    else:
        entry["mixture"] = mixture
    params[stage][key] = entry
    (line,) = problems(params)
    assert line.startswith(f"{stage}.{key}.{setting}: the mixture gives prose 0.1 of 4 windows a step, which is less")


def test_tokenizer_without_text_is_a_problem(params: dict[str, Any]) -> None:
    params["ingest"]["sources"] = []
    assert any(line.startswith("tokenize.tokenizer.name: found 'train', but no source") for line in problems(params))


@pytest.mark.parametrize(("stage", "key"), [("align", "policy"), ("prune", "pruned"), ("evaluate", "tuned")])
def test_reply_as_long_as_the_context_is_a_problem(params: dict[str, Any], stage: str, key: str) -> None:
    context = params["tokenize"]["context"]
    params["reward"], params["align"]["policy"]["reward"] = {}, {"name": "function", "path": "tasks/code.py"}
    params["quantize"]["chat"]["max_new_tokens"] = params[stage][key]["max_new_tokens"] = context
    params["compare"]["gates"] = []
    lines = problems(params)
    assert any(
        line.startswith(f"{stage}.{key}.max_new_tokens: found {context}, but it should be less") for line in lines
    )


def test_mask_tokens_are_needed_by_masked_training(params: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    params["tokenize"]["tokenizer"] = {"name": "from", "path": str(tmp_path)}
    params["reward"]["judge"] |= {"model": str(tmp_path), "word_dropout": 0.1}
    lines = problems(params)
    assert (
        "pretrain.masked.objective: found 'masked', but the tokenizer has no mask token: use the tokenizer of a "
        in (next(line for line in lines if line.startswith("pretrain.masked")) + " ")
    )
    assert any(line.startswith("reward.judge.word_dropout: found 0.1, but the tokenizer of") for line in lines)


def test_table_of_a_source_without_one_is_detected(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has rows of people's ratings."""
    del params["ingest"]["sources"][3]["table"]
    del params["ingest"]["sources"][3]["format"]
    check(params)
    params["ingest"]["sources"][3]["path"] = "smalltalk.jsonl"
    assert any(line.startswith("reward.train: it learns from rankings") for line in problems(params))
