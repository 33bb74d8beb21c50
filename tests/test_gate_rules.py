"""Gates and evaluations that settings rule out are reported before anything runs, with what would be possible."""

from pathlib import Path
from typing import Any

import pytest

from tasks.common.defaults import read_settings
from tasks.rules.data import tables_by_source
from tasks.rules.gates import (
    STAGE_FIGURES,
    check_data_of_evaluations,
    check_evaluations,
    check_gates,
    possible_figures,
)
from tests.conftest import ROOT
from tests.training_fixtures import SETTINGS, Chain, chain

__all__ = ["chain"]


@pytest.fixture
def params() -> dict[str, Any]:
    """The default profile."""
    return read_settings(ROOT / "profiles/default.yaml")


def gate_problems(params: dict[str, Any], **gate: Any) -> list[str]:
    """Return the problems of one gate."""
    return list(check_gates({**params, "compare": {"gates": [{"min": 0.5, **gate}]}}, tables_by_source(params)))


def figures_of(params: dict[str, Any], model: str) -> list[str] | None:
    """Return the figures that an evaluated model can have."""
    return possible_figures(params, tables_by_source(params))[model]


def without_sources(params: dict[str, Any], *tables: str) -> dict[str, Any]:
    """Return the settings with one source of each of these tables."""
    sources = [{"name": table, "kind": "files", "format": "jsonl", "table": table} for table in tables]
    return {**params, "ingest": {**params["ingest"], "sources": sources}}


@pytest.mark.parametrize(
    ("gate", "found"),
    [
        ({"metric": "masked_names", "model": "tuned"}, "tuned can have parameters, bytes, exact_match_seen"),
        ({"metric": "exact_match_heldout", "model": "encoder"}, "encoder can have parameters, bytes, masked_names"),
        ({"metric": "win_rate", "model": "tuned"}, "found 'win_rate', but tuned can have"),
        ({"metric": "toxic_share", "model": "policy"}, "found 'toxic_share', but policy can have"),
        ({"metric": "reward_mean", "model": "policy", "against": "encoder"}, "but encoder can have"),
        (
            {"metric": "speed", "model": "quantize@chat"},
            "quantize@chat can have bytes, fp32_bytes, ratio",
        ),
        ({"metric": "bytes", "model": "nobody"}, "should be an entry of evaluate (base, encoder,"),
    ],
)
def test_gate_on_an_impossible_figure_says_what_is_possible(
    gate: dict[str, Any], found: str, params: dict[str, Any]
) -> None:
    [problem] = gate_problems(params, **gate)
    assert found in problem


def test_possible_gates_have_no_problem(params: dict[str, Any]) -> None:
    """Those of the profile; the win rate of an aligned model and its descendants; a figure of a named evaluation."""
    assert list(check_gates(params, tables_by_source(params))) == []
    assert gate_problems(params, metric="win_rate", model="policy") == []
    assert gate_problems(params, metric="win_rate", model="chat") == []
    params["evaluations"]["wide"] = {"kind": "text", "window": 256}
    assert gate_problems(params, metric="wide.bits_per_byte", model="chat") == []
    assert gate_problems(params, metric="wide.bits_per_byte", model="encoder") != []


def test_figures_follow_from_what_sources_can_give(params: dict[str, Any]) -> None:
    """Without conversations there is no diversity, without a corpus no perplexity, without answers no exact match."""
    params["evaluations"] = {}
    base = figures_of(without_sources(params, "corpus"), "base")
    assert base == ["parameters", "bytes", "perplexity", "bits_per_byte"]
    figures = figures_of(without_sources(params, "instructions"), "base")
    assert figures is not None
    assert {"exact_match_seen", "distinct_2", "reward_mean"} <= set(figures)
    assert "perplexity" not in figures
    assert "preference_accuracy" not in figures
    ranked = without_sources(params, "rankings")
    pairs = possible_figures(ranked, tables_by_source(ranked))
    assert pairs["base"] == ["parameters", "bytes", "preference_accuracy"]
    assert pairs["policy"] == ["parameters", "bytes", "preference_accuracy", "implicit_reward_accuracy"]
    chats = without_sources(params, "instructions")
    chats["ingest"]["sources"][0]["format"] = "sharegpt"
    assert "exact_match_seen" not in (figures_of(chats, "base") or [])


def test_figures_of_a_head_follow_from_its_task(params: dict[str, Any]) -> None:
    params["evaluations"] = {}
    for task, figure, other in (("regression", "pearson", "accuracy"), ("classification", "accuracy", "pearson")):
        params["finetune"]["head"] = {"model": "data/pretrain/masked/model", "task": {"name": task}}
        params["quantize"]["head"] = {"model": "data/finetune/head/model"}
        params["evaluate"] |= {key: {"model": f"data/{key}/head/model"} for key in ("finetune", "quantize")}
        for key in ("finetune", "quantize"):
            figures = figures_of(params, key) or []
            assert (figure in figures, other in figures) == (True, False)


def test_figures_of_one_role_need_its_reward_model(params: dict[str, Any]) -> None:
    del params["reward"]["judge"]
    assert "judge" not in str(gate_problems(params, metric="reward_mean", model="policy"))
    [problem] = gate_problems(params, metric="win_rate", model="policy")
    assert "policy can have" in problem


def test_empty_evaluations_are_the_default_set(params: dict[str, Any]) -> None:
    params["evaluations"] = {}
    params["compare"]["gates"] = [gate for gate in params["compare"]["gates"] if "abstained" not in gate["metric"]]
    assert list(check_gates(params, tables_by_source(params))) == []


def test_evaluation_of_an_unknown_or_unsuitable_model_is_reported(params: dict[str, Any]) -> None:
    params["evaluations"] |= {
        "text": {"kind": "text", "models": ["nobody"]},
        "exact_match": {"kind": "exact_match", "models": ["encoder", "tuned"]},
    }
    unknown, unsuitable = sorted(check_evaluations(params), key=len)
    assert "evaluations.text.models.0: found 'nobody', but the entries of evaluate are base, encoder" in unknown
    assert "evaluations.exact_match.models.0: found 'encoder', a masked model, but exact_match applies to" in unsuitable


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_figure_of_a_stage_can_be_gated(chain: Chain, tmp_path: Path) -> None:
    """The patterns of STAGE_FIGURES cover what the stages really report."""
    from fnmatch import fnmatchcase

    for name in SETTINGS:
        stage = name.partition("@")[0]
        if stage in STAGE_FIGURES:
            chain.path(f"data/{name.replace('@', '/')}/model")
            figures = [key for key, value in chain.metrics[name].items() if isinstance(value, int | float | dict)]
            missing = [key for key in figures if not any(fnmatchcase(key, one) for one in STAGE_FIGURES[stage])]
            assert missing == [], name


def test_evaluation_without_data_is_reported(params: dict[str, Any]) -> None:
    """What is listed was asked for; of the default set, what cannot be measured is left out."""
    chats = without_sources(params, "instructions")
    lines = list(check_data_of_evaluations(chats, tables_by_source(chats)))
    assert [line.partition(":")[0] for line in lines] == ["evaluations.text", "evaluations.masked_names"]
    assert "Add what is missing, or remove the evaluation" in lines[0]
    assert list(check_data_of_evaluations(params, tables_by_source(params))) == []
    chats["evaluations"] = {}
    assert list(check_data_of_evaluations(chats, tables_by_source(chats))) == []


def test_gate_of_an_unknown_model_is_one_problem(params: dict[str, Any]) -> None:
    """What it may be compared with depends on the model."""
    [problem] = gate_problems(params, metric="bytes", model="nobody", against="base")
    assert problem.startswith("compare.gates.0.model: found 'nobody'")
