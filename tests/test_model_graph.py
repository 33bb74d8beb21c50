"""The graph of `params.yaml`: order, links, and messages for invalid graphs."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.common.harness.job import Link
from tasks.common.harness.lineage import ancestry, lineage
from tasks.common.model_graph import links_of
from tasks.common.params_file import check
from tasks.common.raw_params import read_params
from tasks.common.settings import SettingsError
from tests.conftest import ROOT
from tests.foreign_fixtures import foreign_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture
def params() -> Any:
    """The default profile's settings, to be changed."""
    return json.loads(json.dumps(read_params(ROOT / "profiles" / "default.yaml")))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the user's with a config.json, a tokenizer and one weight, in a project with the profile's files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data/sources/evaluation", tmp_path / "data/sources/evaluation")
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_file({"weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    foreign_tokenizer().save_pretrained(folder)
    return "models/mine"


def problems(params: dict[str, Any], stages: list[str] | None = None) -> list[str]:
    """Return the problems that `check` reports, one per line."""
    with pytest.raises(SettingsError) as failure:
        check(params, stages=stages or [])
    return [line.strip() for line in str(failure.value).splitlines()[1:]]


def names(params: dict[str, Any]) -> list[str]:
    return [link.name for link in links_of(params)]


# Order and links


def test_entries_are_in_dependency_order_and_then_file_order(params: dict[str, Any]) -> None:
    order = names(params)
    assert order[:5] == ["pretrain@causal", "pretrain@masked", "finetune@chat", "reward@train", "reward@judge"]
    assert order[5:9] == ["align@policy", "prune@pruned", "quantize@chat", "quantize@encoder"]


def test_an_entry_may_start_from_one_that_the_file_names_later(params: dict[str, Any]) -> None:
    params["finetune"] = {"second": {**params["finetune"]["chat"], "model": "data/finetune/chat/model"}} | params[
        "finetune"
    ]
    order = names(params)
    assert order.index("finetune@chat") < order.index("finetune@second")


def test_a_model_after_alignment_may_be_fine_tuned_once_more(params: dict[str, Any]) -> None:
    params["finetune"]["later"] = {**params["finetune"]["chat"], "model": "data/align/policy/model"}
    params["evaluate"]["later"] = {**params["evaluate"]["tuned"], "model": "data/finetune/later/model"}
    check(params)
    order = names(params)
    assert order.index("align@policy") < order.index("finetune@later")


def test_ancestry_and_lineage_follow_the_links() -> None:
    links = (
        Link("finetune@chat", ("models/mine",)),
        Link("reward@train", ("models/mine",), "train"),
        Link("align@dpo", ("data/finetune/chat/model", "data/reward/train/model")),
        Link("evaluate@dpo", ("data/align/dpo/model",)),
    )
    assert ancestry(links, "data/align/dpo/model") == [
        "data/align/dpo/model",
        "data/finetune/chat/model",
        "models/mine",
    ]
    assert lineage(links, ["data/align/dpo/model"]) == ["finetune@chat", "reward@train", "align@dpo"]
    assert lineage(links, ["models/mine"]) == []


# Invalid graphs


def test_a_cycle_is_reported_with_its_entries(params: dict[str, Any]) -> None:
    params["finetune"]["chat"]["model"] = "data/align/policy/model"
    [message] = problems(params)
    assert message.startswith("align.policy: align@policy → finetune@chat → align@policy form a cycle")
    with pytest.raises(nx.NetworkXUnfeasible):
        links_of(params)


def test_an_entry_that_starts_from_itself_is_a_cycle(params: dict[str, Any]) -> None:
    params["prune"]["pruned"]["model"] = "data/prune/pruned/model"
    assert any("prune@pruned → prune@pruned form a cycle" in line for line in problems(params))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/finetune/x/model", "no entry makes that; there are data/pretrain/causal/model"),
        ("data/finetune/chat", "no entry makes that"),
        ("data/evaluate/base/model", "no entry makes that"),
        ("data/ingest/checkpoint", "ingest.checkpoint is null: set it to a model"),
        ("./data/finetune/chat/model", "write it as 'data/finetune/chat/model'"),
        ("data/finetune/chat/model/", "write it as 'data/finetune/chat/model'"),
    ],
)
def test_an_unknown_parent_is_reported(path: str, message: str, params: dict[str, Any]) -> None:
    params["align"]["policy"]["model"] = path
    messages = [line for line in problems(params) if line.startswith("align.policy.model: found")]
    assert len(messages) == 1
    assert message in messages[0]


def test_tokenizer_of_a_model_of_the_graph_is_reported(params: dict[str, Any]) -> None:
    params["tokenize"]["tokenizer"] = {"name": "from", "path": "data/finetune/chat/model"}
    [message] = problems(params)
    assert message.startswith(
        "tokenize.tokenizer.path: found 'data/finetune/chat/model', but all models of the graph are trained with"
    )


@pytest.mark.parametrize("name", ["a.b", "1st", "über", "a b", "", "a" * 64, 1, True])
def test_invalid_entry_name_is_reported(name: Any, params: dict[str, Any]) -> None:
    params["finetune"][name] = copy.deepcopy(params["finetune"]["chat"])
    assert any(f"found the name {name!r}, but a name is up to 63" in line for line in problems(params))


def test_an_entry_without_a_use_is_reported(params: dict[str, Any]) -> None:
    params["prune"]["small"] = copy.deepcopy(params["prune"]["pruned"])
    [message] = problems(params)
    assert message.startswith("prune.small: no other entry, evaluation or package reads data/prune/small/model")
    params["evaluate"]["small"] = {**params["evaluate"]["pruned"], "model": "data/prune/small/model"}
    check(params)


def test_a_reward_model_is_used_by_every_evaluation(params: dict[str, Any]) -> None:
    params["reward"]["other"] = copy.deepcopy(params["reward"]["train"])
    check(params)


def test_missing_folder_is_reported_for_the_stages_that_read_it(params: dict[str, Any], checkpoint: str) -> None:
    params["finetune"]["chat"]["model"] = "models/other"
    check(params, stages=["pretrain@causal"])
    [message] = problems(params, ["finetune@chat"])
    assert message.startswith("finetune.chat.model: found 'models/other', but there is no such file or folder here")


def test_a_section_of_another_kind_is_reported(params: dict[str, Any]) -> None:
    params["prune"] = ["small"]
    assert "prune: found ['small'], but it should hold entries by name, or be {}" in problems(params)


# Rules between entries and their models


def test_model_sizes_come_from_the_parent_entry(params: dict[str, Any], checkpoint: str) -> None:
    method = {"name": "lora", "rank": 9, "alpha": 9, "dropout": 0.0, "rank_stabilized": False, "dora": False}
    params["finetune"]["legal"] = {
        **params["finetune"]["chat"], "model": checkpoint, "method": {**method, "targets": "all-linear"},
        "pretraining_mix": {**params["finetune"]["chat"]["pretraining_mix"], "weight": 0.0},
    }  # fmt: skip
    params["evaluate"]["legal"] = {
        **params["evaluate"]["tuned"],
        "model": "data/finetune/legal/model",
        "max_new_tokens": 16,
    }
    params["evaluations"]["text"]["window"] = 32
    assert problems(params) == [
        "finetune.legal.method.rank: found 9, but it should be at most hidden in models/mine/config.json, which is 8: "
        "the rank of a matrix is at most the model's width"
    ]
    params["finetune"]["legal"]["method"]["rank"] = 8
    params["evaluations"]["text"]["window"] = 33
    [message] = problems(params)
    assert message.startswith(
        "evaluations.text.window: found 33, but it should be at most positions in models/mine/config.json"
    )


@pytest.mark.parametrize(
    ("where", "model", "message"),
    [
        ("finetune.chat", "data/pretrain/masked/model", "a masked model, but the task chat needs a causal one"),
        ("align.policy", "data/pretrain/masked/model", "a masked model, but it should be a causal model"),
        ("prune.pruned", "data/quantize/chat/model", "form a cycle"),
        ("quantize.chat", "data/reward/train/model", "a reward model, but it should be a causal, masked"),
        (
            "evaluate.base",
            "data/reward/train/model",
            "a reward model, but it should be a model other than a reward model",
        ),
    ],
)
def test_a_stage_takes_models_of_its_kinds(where: str, model: str, message: str, params: dict[str, Any]) -> None:
    stage, _, key = where.partition(".")
    params[stage][key]["model"] = model
    assert any(message in line for line in problems(params))


def test_a_classifier_is_evaluated_and_not_aligned(params: dict[str, Any]) -> None:
    params["finetune"]["topics"] = {
        **params["finetune"]["chat"], "model": "data/pretrain/masked/model",
        "task": {"name": "classification", "max_labels": 5},
        "pretraining_mix": {**params["finetune"]["chat"]["pretraining_mix"], "weight": 0.0},
    }  # fmt: skip
    params["evaluate"]["topics"] = {**params["evaluate"]["encoder"], "model": "data/finetune/topics/model"}
    check(params)
    params["align"]["policy"]["model"] = "data/finetune/topics/model"
    assert any("a classifier, but it should be a causal model" in line for line in problems(params))


def test_the_package_holds_exports_of_its_kinds(params: dict[str, Any]) -> None:
    params["package"]["chat"] = "data/quantize/encoder/model"
    assert "made of a masked model, but it should be of a causal model" in problems(params)[0]
    params["package"]["chat"] = "data/align/policy/model"
    assert "it should be the folder of an entry of quantize" in problems(params)[0]
    del params["package"]["chat"], params["package"]["encoder"]
    assert problems(params)[0].startswith("package: nothing would be served")


def test_the_package_takes_an_exported_classifier_as_classifier(params: dict[str, Any]) -> None:
    chat = params["finetune"]["chat"]
    params["finetune"]["topics"] = {
        **chat, "model": "data/pretrain/masked/model", "task": {"name": "classification", "max_labels": 5},
        "pretraining_mix": {**chat["pretraining_mix"], "weight": 0.0},
    }  # fmt: skip
    params["quantize"]["topics"] = {"model": "data/finetune/topics/model"}
    params["package"]["classifier"] = "data/quantize/topics/model"
    check(params)
    params["package"] |= {"classifier": "data/quantize/encoder/model"}
    del params["quantize"]["topics"], params["finetune"]["topics"]
    [message] = problems(params)
    assert "made of a masked model, but it should be of a classifier or a regression model" in message


def test_masked_pretraining_continues_only_a_masked_model(params: dict[str, Any]) -> None:
    params["pretrain"]["masked"]["model"] = {"name": "from", "path": "data/pretrain/causal/model"}
    assert any("a causal model, but the objective masked needs a masked one" in line for line in problems(params))


def test_different_judge_shares_are_reported(params: dict[str, Any]) -> None:
    params["reward"]["judge"]["judge_share"] = 0.2
    [message] = problems(params)
    assert message.startswith(
        "reward.judge.judge_share: found 0.2, but reward.train.judge_share is 0.3: make them equal"
    )
    params["reward"]["judge"]["judge_share"] = 0.3
    params["align"]["policy"]["reward"]["path"] = "data/reward/judge/model"
    assert "whose role is judge: a judge cannot evaluate a policy" in problems(params)[0]


def test_rankings_as_reward_require_dpo(params: dict[str, Any]) -> None:
    reward = {"name": "rankings", "path": "data/validate/rankings", "judge_share": 0.3, "input": "conversation"}
    params["align"]["policy"]["reward"] = reward
    messages = problems(params)
    assert any(
        line.startswith("align.policy.reward.input: found 'conversation', but reward.train.input") for line in messages
    )
    assert any("which needs align.policy.algorithm.name to be dpo (it is ppo)" in line for line in messages)


def test_gates_on_unknown_models_or_figures_are_reported(params: dict[str, Any]) -> None:
    params["compare"]["gates"] = [
        {"metric": "exact_match", "model": "tuned", "min": 0.5},
        {"metric": "masked_names", "model": "enkoder", "min": 0.5},
        {"metric": "reward_mean", "model": "policy", "against": "reward@train", "min": 0.5},
        {"metric": "gap_at_least_1.model", "model": "reward@train", "min": 0.5},
        {"metric": "anything.at_all", "model": "reward@train", "min": 0.5},
    ]
    messages = problems(params)
    assert [line.partition(": found ")[0] for line in messages] == [
        "compare.gates.0.metric", "compare.gates.1.model", "compare.gates.2.against", "compare.gates.4.metric",
    ]  # fmt: skip
