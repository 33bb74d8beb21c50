"""Settings against the sources: what no source provides is reported before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

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
    (line,) = problems(params, "ingest")
    assert line.startswith("ingest.sources.0.path: found 'nowhere.csv', but data/sources/nowhere.csv does not exist")


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
