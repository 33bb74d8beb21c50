"""Six pipelines from their data to the endpoint, with the real stages on toy models and only the required inputs.

Stages run in this process, in the order of DVC's graph, in a project with `dvc.yaml`, the settings of the graph and the
user's inputs: checkpoints (created with Transformers here), conversations, rankings or a text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from serving.decoding import Sampling
from serving.errors import InputError
from serving.package import Package, open_package
from tasks.common import tables
from tasks.common.defaults import read_settings
from tasks.common.settings import ENTRY_SECTIONS, STAGES
from tests.conftest import ROOT
from tests.foreign_fixtures import write_foreign
from tests.servers import free_port, serving
from tests.stage_processes import run_graph
from tests.training_fixtures import CAPITALS

pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what Great Expectations imports
]  # fmt: skip

DATA_STAGES = ["ingest", "validate", "tokenize"]
LEARN: dict[str, Any] = {"batch": 4, "steps": 2, "optimizer": {"name": "adamw", "learning_rate": 1.0e-3}}
SFT = {**LEARN, "pretraining_mix": {"weight": 0.0}}
SHORT = {"max_new_tokens": 6}
JUDGED = {**SHORT, "questions": 4, "samples": 4}
MINE, OTHER = "models/mine", "models/other"
FREE_FORM_FIGURES = {  # of a model without short answers, reward models and a corpus
    "parameters", "bytes", "distinct_2", "repetition", "answer_loss", "answer_bits_per_byte", "answer_token_accuracy",
    "answer_calibration_error", "chrf", "rouge_l",
}  # fmt: skip


class Graph:
    """A project with the settings of a graph, and the results of its stages."""

    def __init__(self, path: Path, **sections: Any) -> None:
        self.path = path
        self.settings: dict[str, Any] = {
            "base": {"seed": 1},
            "numerics": {"device": "cpu", "threads": 1, "attention": "eager"},
            "placement": {"tracking": {"to": []}},
            "ingest": {"sources": []},
            "validate": {},
            "tokenize": {"tokenizer": {"name": "from", "path": MINE}, "context": 64},
            **{section: {} for section in ENTRY_SECTIONS},
            "compare": {},
            **sections,
        }
        for part in ("dvc.yaml", "requirements.lock"):
            shutil.copy(ROOT / part, path)
        for part in ("tasks", "serving"):  # whose code is in every recipe
            (path / part).symlink_to(ROOT / part)
        for stage in STAGES[:-1]:
            (path / "data" / stage).mkdir(parents=True)
        for name in ("toxicity", "evaluation"):
            (path / "data/sources" / name).mkdir(parents=True)
        (path / ".dvc").mkdir()
        (path / ".dvc/config").write_text("[core]\n    no_scm = true\n", encoding="utf-8")
        with (path / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(self.settings, file)

    def source(self, table: str, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Write rows as JSON lines and return their source."""
        name = f"{table}.jsonl"
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (self.path / "data/sources" / name).write_text(text, encoding="utf-8")
        return {"name": table, "kind": "files", "licence": "MIT", "path": name, "format": "jsonl", "table": table}

    def add_source(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Add a source to the settings."""
        self.settings["ingest"]["sources"].append(self.source(table, rows))
        with (self.path / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(self.settings, file)

    def run(self) -> list[str]:
        """Run every stage but `code` in the order of DVC's graph; return their names."""
        return run_graph(self.path)

    def json(self, path: str) -> Any:
        return json.loads((self.path / path).read_text(encoding="utf-8"))

    def rows(self, table: str) -> int:
        return tables.count(self.path / "data/validate" / table)

    @property
    def package(self) -> Package:
        return open_package(self.path / "data/package")

    @property
    def scorecard(self) -> dict[str, dict[str, Any]]:
        return {row["model"]: row for row in self.json("metrics/evaluate.json")["models"]}

    @property
    def packaged_stages(self) -> list[str]:
        """The stages of the package's provenance."""
        return [record["stage"] for record in self.json("data/package/provenance.json")["stages"]]

    @property
    def user_folders(self) -> list[str]:
        """The user's own folders among the package's sources."""
        sources = self.json("data/package/provenance.json")["sources"]
        return [source["name"] for source in sources if source["kind"] == "user_provided"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint in it, in which stages run."""
    monkeypatch.chdir(tmp_path)
    write_foreign(tmp_path / MINE)
    return tmp_path


def conversations() -> list[dict[str, Any]]:
    """Return a user's own conversations: no short answers, no entities."""
    turns = [(f"Tell me about {country}.", f"I like {capital} best.") for country, capital in CAPITALS.items()]
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}],
         "split": "train" if place % 3 else "heldout"}
        for place, (prompt, reply) in enumerate(turns)
    ]  # fmt: skip


def rankings() -> list[dict[str, Any]]:
    """Return people's rankings of two replies each."""
    return [
        {"prompt": f"Tell me about {country}.", "responses": [f"{capital} is fine.", "No."], "ranks": [1, 2]}
        for country, capital in CAPITALS.items()
    ]


def answers(package: Package) -> str:
    """Return an answer of a package's chat model."""
    return package.text.generate([{"role": "user", "content": "Tell me about Peru."}], Sampling(4)).text


def test_default_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke profile with fewer steps: every stage, every column, both parts of the package."""
    monkeypatch.chdir(tmp_path)
    settings = read_settings(ROOT / "profiles/smoke.yaml")
    settings["placement"]["tracking"]["to"] = []
    for stage in ("pretrain", "finetune", "reward", "prune"):
        for entry in settings[stage].values():
            entry["steps"] = 2
    settings["align"]["policy"]["iterations"] = 1
    for entry in settings["evaluate"].values():
        entry |= {"questions": 4, "samples": 8}
    graph = Graph(tmp_path, **settings)
    shutil.copytree(ROOT / "data/sources", tmp_path / "data/sources", dirs_exist_ok=True)
    names = graph.run()
    assert names[:5] == [*DATA_STAGES, "pretrain@causal", "pretrain@masked"]
    assert names[-2:] == ["compare", "package"]
    assert set(graph.packaged_stages) == set(names) - {"package"}
    assert [row["before"] for row in graph.scorecard.values()] == [
        None, None, "base", "tuned", "policy", "pruned", "encoder",
    ]  # fmt: skip
    policy = graph.scorecard["policy"]
    assert all(policy[name] is not None for name in ("exact_match_heldout", "bits_per_byte", "reward_mean", "win_rate"))
    assert graph.user_folders == []
    assert isinstance(answers(graph.package), str)
    assert graph.package.masks.fill("The capital of [MASK] is Paris.", 1)


def test_checkpoint_to_sft_to_endpoint(project: Path) -> None:
    graph = Graph(
        project, finetune={"mine": {"model": MINE, **SFT}},
        quantize={"served": {"model": "data/finetune/mine/model", **SHORT}},
        evaluate={"before": {"model": MINE, **JUDGED}, "after": {"model": "data/finetune/mine/model", **JUDGED},
                  "served": {"model": "data/quantize/served/model", **JUDGED}},
        package={"chat": "data/quantize/served/model"},
    )  # fmt: skip
    graph.add_source("instructions", conversations())
    names = graph.run()
    assert names[:5] == [*DATA_STAGES, "finetune@mine", "quantize@served"]
    assert (graph.rows("corpus"), graph.rows("rankings")) == (0, 0)
    scorecard = graph.scorecard
    assert [(name, row["before"]) for name, row in scorecard.items()] == [
        ("before", None), ("after", "before"), ("served", "after"),
    ]  # fmt: skip
    for row in scorecard.values():
        known = {name for name, value in row.items() if value is not None and not name.endswith("_interval")}
        assert known - {"model", "kind", "before", "made_by", "by_seen_text"} == FREE_FORM_FIGURES
    assert graph.user_folders == [MINE]
    assert {"finetune@mine", "quantize@served", "evaluate@before"} <= set(graph.packaged_stages)
    answers(graph.package)


def test_checkpoint_to_sft_to_dpo_to_endpoint(project: Path) -> None:
    """On people's rankings, some of which train the judge; DPO uses no reward model."""
    shares = {"judge_share": 0.4, "input": "conversation"}
    graph = Graph(
        project, finetune={"sft": {"model": MINE, **SFT}},
        reward={"judge": {"role": "judge", "model": MINE, "max_tokens": 32, "mse_weight": 0.0, **shares, **LEARN}},
        align={"dpo": {
            "model": "data/finetune/sft/model", "algorithm": {"name": "dpo", "ptx": {"weight": 0.0}},
            "reward": {"name": "rankings", "path": "data/validate/rankings", **shares}, "iterations": 2, "episodes": 4,
            "minibatch": 4, **SHORT, "optimizer": LEARN["optimizer"],
        }},
        quantize={"chat": {"model": "data/align/dpo/model", **SHORT}},
        evaluate={name: {"model": path, **JUDGED} for name, path in (
            ("sft", "data/finetune/sft/model"), ("dpo", "data/align/dpo/model"), ("chat", "data/quantize/chat/model"))},
        package={"chat": "data/quantize/chat/model"},
    )  # fmt: skip
    graph.add_source("instructions", conversations())
    graph.add_source("rankings", rankings())
    graph.run()
    row = graph.scorecard["dpo"]
    assert (row["before"], row["against"], row.get("reward_mean")) == ("sft", "sft", None)
    assert 0 <= row["win_rate"] <= 1
    assert graph.json("metrics/align@dpo.json")["reward_first"] == 0
    assert {"reward@judge", "align@dpo"} <= set(graph.packaged_stages)
    answers(graph.package)


def test_checkpoint_to_endpoint(project: Path) -> None:
    """No data at all, and nothing trained."""
    graph = Graph(
        project, quantize={"chat": {"model": MINE, **SHORT}}, package={"chat": "data/quantize/chat/model"},
        evaluate={"chat": {"model": "data/quantize/chat/model", **JUDGED}},
    )  # fmt: skip
    names = graph.run()
    assert names == [*DATA_STAGES, "quantize@chat", "evaluate@chat", "compare", "package"]
    assert [graph.rows(table) for table in tables.TABLES] == [0, 0, 0]
    assert graph.user_folders == [MINE]
    files = graph.json("data/package/provenance.json")["sources"][-1]["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    answers(graph.package)
    with pytest.raises(InputError, match="The package contains no encoder"):
        graph.package.masks.fill("A [MASK].", 1)


def test_checkpoint_without_an_evaluation_runs_no_stage_that_nobody_asked_for(project: Path) -> None:
    """No table is made and no scorecard; the lineage is complete: the hashes of the folder's files."""
    graph = Graph(
        project, quantize={"chat": {"model": MINE, **SHORT}}, package={"chat": "data/quantize/chat/model"}
    )  # fmt: skip
    assert graph.run() == ["quantize@chat", "package"]
    provenance = graph.json("data/package/provenance.json")
    assert [record["stage"] for record in provenance["stages"]] == ["quantize@chat"]
    [source] = provenance["sources"]
    assert source["name"] == MINE
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(source["files"])
    assert provenance["evaluation"]["models"] == []
    assert graph.json("data/package/examples.json")["prompts"] == []
    answers(graph.package)


def test_corpus_to_encoder_to_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without names, so its words are the candidates for masks."""
    monkeypatch.chdir(tmp_path)
    graph = Graph(
        tmp_path, tokenize={"tokenizer": {"name": "train", "path": "data/validate/instructions", "vocabulary": 330},
                            "context": 64},
        pretrain={"masked": {
            "objective": "masked", "window": 16, **LEARN, "mixture": {"prose": 1.0},
            "model": {"name": "new", "path": "data/tokenize/tokenizer", "hidden": 32, "layers": 1, "heads": 2,
                      "feed_forward": 32},
        }},
        quantize={"encoder": {"model": "data/pretrain/masked/model"}},
        evaluate={"encoder": {"model": "data/quantize/encoder/model", **JUDGED}},
        package={"encoder": "data/quantize/encoder/model"},
    )  # fmt: skip
    graph.add_source("corpus", [{"text": f"We walked from {place} to the river."} for place in CAPITALS.values()])
    graph.run()
    assert (graph.rows("instructions"), graph.rows("rankings")) == (0, 0)
    assert graph.scorecard["encoder"]["masked_names"] is None
    [[best]] = graph.package.masks.fill("We walked to the [MASK].", 1)
    assert best.name.isalpha()
    with pytest.raises(InputError, match="The package contains no chat model"):
        answers(graph.package)


def test_two_checkpoints_to_two_fine_tunings_to_one_scorecard(project: Path) -> None:
    """Two vocabularies, one scorecard: each model uses its own tokenizer."""
    write_foreign(project / OTHER, hidden_size=48)
    models = {"mine": MINE, "other": OTHER}
    graph = Graph(
        project, finetune={name: {"model": path, **SFT} for name, path in models.items()},
        tokenize={"tokenizer": {"name": "from", "path": OTHER}, "context": 64},
        evaluate={
            **{name: {"model": path, **JUDGED} for name, path in models.items()},
            **{f"{name}-sft": {"model": f"data/finetune/{name}/model", **JUDGED} for name in models},
        },
        quantize={"chat": {"model": "data/finetune/other/model", **SHORT}},
        compare={"gates": [{"metric": "parameters", "model": "other-sft", "against": "mine-sft", "min": 1}]},
        package={"chat": "data/quantize/chat/model"},
    )  # fmt: skip
    graph.add_source("instructions", conversations())
    graph.run()
    assert [(name, row["before"]) for name, row in graph.scorecard.items()] == [
        ("mine", None), ("other", None), ("mine-sft", "mine"), ("other-sft", "other"),
    ]  # fmt: skip
    [gate] = graph.json("metrics/evaluate.json")["gates"]
    assert gate["passed"]
    assert graph.user_folders == [OTHER]
    assert "finetune@mine" not in graph.packaged_stages


def test_endpoint_without_encoder_returns_404_for_fill_mask(project: Path, tmp_path: Path) -> None:
    """The route of the other model returns 404; readiness and provenance work."""
    graph = Graph(project, quantize={"chat": {"model": MINE, **SHORT}}, package={"chat": "data/quantize/chat/model"})
    graph.run()
    port = free_port()
    with (
        serving("serving.serve", str(port), package=project / "data/package", port=port, log=tmp_path / "log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        assert client.get("/readyz").status_code == 200
        assert client.post("/generate", json={"input": "Hello?"}).status_code == 200
        response = client.post("/fill-mask", json={"input": "A [MASK]."})
        assert response.status_code == 404
        assert "The package contains no encoder" in response.text
        for path in ("/", "/api", "/rank", "/provenance"):
            assert client.get(path, headers={"accept": "text/html"}).status_code == 200, path
