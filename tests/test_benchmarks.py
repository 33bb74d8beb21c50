"""Unit tests of the benchmarks, without measuring: names, result files, targets, alternation, reading of runs."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import alternatives, curation_run, endpoint, harness, machine, medquad, medquad_run, pipeline, ranking
from benchmarks.harness import BenchmarkError, Measurements, Row
from benchmarks.pretrain import PROFILE
from tasks.common.defaults import read_settings
from tasks.common.params_file import check
from tasks.validate.near_duplicates import NearDuplicates

AROUND = {"commit": "0" * 40, "hardware": {"cpu": "none", "cores": 2}, "versions": {"python": "3.11"}}


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_complete(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert harness.find_problems(result) == []
    assert result["name"] in (*command.NAMES, *command.OPTIONAL_NAMES)
    assert path.stem.partition("-")[0] == result["name"]
    assert "-dirty" not in result["commit"], "a record names a commit that holds all of its code"


def test_written_result_obeys_its_own_schema(tmp_path: Path) -> None:
    rows = [Row("speed", 812.34567, "tokens/s", 203.0, "peer", "ratio >= 4"), Row("chain", None, "s", target="<= 720")]
    path = harness.write("serve", Measurements(rows, ["a note"]), AROUND, tmp_path)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert harness.find_problems(result) == []
    assert result["command"] == "python -m benchmarks serve"
    first, second = result["rows"]
    assert first == {
        "what": "speed", "ours": 812.3, "peer": 203.0, "peer_name": "peer", "unit": "tokens/s", "ratio": 4.002,
        "target": "ratio >= 4", "met": True,
    }  # fmt: skip
    assert (second["ours"], second["met"]) == (None, False)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": []}, "rows is empty"),
        ({"commit": None}, "commit is not a string"),
        ({"rows": [{"what": "speed"}]}, "expected the keys"),
        ({"rows": [{**Row("a", 1.0, "s", target="<= 5").to_dict(), "met": False}]}, "its figures give True"),
        ({"rows": [{**Row("a", 1.0, "s", target="<= 5").to_dict(), "target": "fast"}]}, "is not like"),
    ],
)
def test_damaged_result_is_reported(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = harness.write("serve", Measurements([Row("a", 1.0, "s")]), AROUND, tmp_path)
    result = {**json.loads(path.read_text(encoding="utf-8")), **change}
    assert problem in " ".join(harness.find_problems(result))


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("a", 5.0, "s", target="<= 5"), True),
        (Row("a", 5.01, "s", target="<= 5"), False),
        (Row("a", 0.9, "share", target=">= 0.9"), True),
        (Row("a", 27.0, "bytes", 100.0, "peer", "ratio <= 0.28"), True),
        (Row("a", 3.9, "1/s", 1.0, "peer", "ratio >= 4"), False),
        (Row("a", 1.0, "s"), None),
        (Row("a", None, "s", target="<= 5"), False),
    ],
)
def test_row_met_follows_from_figure_and_target(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_a_peer_has_a_name_and_a_figure() -> None:
    with pytest.raises(ValueError, match="a name and a figure"):
        Row("a", 1.0, "s", 2.0)


def test_every_name_is_a_benchmark() -> None:
    for name in (*command.NAMES, *command.OPTIONAL_NAMES):
        module = importlib.import_module(f"benchmarks.{name}")
        assert all(callable(getattr(module, part)) for part in ("check", "threads", "measure")), name


def test_a_wrong_name_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["spede"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("spede", *command.NAMES))


def test_missing_path_prints_message_and_exits_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        harness.require_paths(harness.ROOT / "data" / "no such folder", remedy="run `bessemer run` first.")

    monkeypatch.setattr(pipeline, "check", check)
    assert command.main(["pipeline"]) == 1
    assert "data/no such folder is missing: run `bessemer run` first." in capsys.readouterr().err


def test_alternate_and_median() -> None:
    order: list[str] = []

    def side(name: str) -> harness.Figures:
        order.append(name)
        return {"speed": len(order)}

    results = harness.alternate({"ours": lambda: side("ours"), "peer": lambda: side("peer")}, rounds=3)
    assert order == ["ours", "peer"] * 3
    assert (harness.median(results["ours"], "speed"), harness.median(results["peer"], "speed")) == (3, 4)


def test_surroundings_name_commit_and_versions() -> None:
    assert machine.commit()
    assert {"python", "torch", "openvino"} <= set(machine.versions())


def log(stage: str, minute: int, seconds: float, peak: float) -> dict[str, Any]:
    """Return a stage's log as the harness writes it."""
    started = f"2026-01-01T12:{minute:02}:00+00:00"
    return {
        "stage": stage, "started": started, "seconds": seconds, "peak_memory_bytes": int(peak * 1e9), "commit": "c",
        "dirty": False, "recipe": f"recipe of {stage}",
    }  # fmt: skip


def write_run(folder: Path, logs: list[dict[str, Any]], **statuses: str) -> None:
    """Write a run's folder."""
    folder.mkdir(parents=True)
    stages = {entry["stage"]: {"status": "ran", "seconds": 1.0} for entry in logs}
    stages |= {name: {"status": status, "seconds": 7.0} for name, status in statuses.items()}
    (folder / "flow.json").write_text(json.dumps({"run": folder.name, "stages": stages}))
    for entry in logs:
        (folder / f"{entry['stage']}.json").write_text(json.dumps(entry))
        record = folder.parents[1] / "data" / entry["stage"] / "record.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"recipe": entry["recipe"]}))


def test_last_complete_run_is_the_latest_with_all_stages(tmp_path: Path) -> None:
    stages = [log("ingest", 1, 60, 1), log("left", 2, 120, 2), log("right", 3, 30, 0.5), log("package", 5, 3, 0.25)]
    other = [{**entry, "recipe": "another profile's"} for entry in stages]
    write_run(tmp_path / "runs/run-20260103-120000-cccc", other, build="ran")
    write_run(tmp_path / "runs/run-20260101-120030-aaaa", stages, code="ran", build="ran")
    write_run(tmp_path / "runs/run-20260102-120000-bbbb", stages[:2], right="up to date", package="ran")
    whole = pipeline.last_complete_run(tmp_path)
    assert whole is not None
    assert whole.name == "run-20260101-120030-aaaa"
    assert whole.seconds == 4 * 60 + 30 + 3 + 7  # from 12:00:30 to package's end at 12:05:03, and the build
    rows = {row.what: row for row in pipeline.run_rows(whole)}
    assert rows["stages one after the other would take"].ours == 213
    assert rows["peak memory of the chain: peaks of stages at the same time, summed"].ours == 2.5
    assert rows["peak memory of the largest stage, left"].ours == 2


def test_no_complete_run_misses_the_targets(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/run-20260101-120030-aaaa", [log("ingest", 1, 60, 1)], package="failed")
    assert pipeline.last_complete_run(tmp_path) is None
    assert {row.met for row in pipeline.run_rows(None)} == {False}


def test_ppo_rows() -> None:
    tuned = {"reward_mean": 0.5, "reward_std": 0.8, "distinct_2": 0.4, "exact_match_seen": 0.97}
    policy = {"reward_mean": 1.2, "reward_std": 0.4, "distinct_2": 0.3, "exact_match_seen": 0.93}
    rows = pipeline.ppo_rows({**tuned, "exact_match_heldout": 0.7}, {**policy, "exact_match_heldout": 0.71})
    verdicts = [(row.unit, round(row.ours or 0, 3), row.met) for row in rows]
    assert verdicts == [
        ("rating points", 0.7, True),
        ("standard deviations", 0.875, False),
        ("share", 0.04, False),
        ("share", -0.01, True),
        ("share", 0.3, True),
    ]


def test_reward_rows_compare_with_bag_of_words() -> None:
    figures = {"pairs": 9, "model": 0.81, "bag_of_words": 0.84}
    assert [row.met for row in pipeline.reward_rows({"gap_at_least_1": figures})] == [True, False]
    assert [row.met for row in pipeline.reward_rows({})] == [False, False]


class Echo(BaseHTTPRequestHandler):
    """Answers like the service, and rejects one question."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        prompt = json.loads(body).get("input", "chat")
        self.send_response(400 if prompt == "no" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    """Serve `Echo` on a free port."""
    with ThreadingHTTPServer((endpoint.HOST, 0), Echo) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("route", [endpoint.GENERATE_ROUTE, endpoint.CHAT_ROUTE])
def test_load_sends_requests_from_many_clients(port: int, route: str) -> None:
    figures = endpoint.load(port, route, ["a", "b"], clients=4, requests=40)
    assert set(figures) == {"requests_per_second", "median_ms", "p95_ms"}
    assert all(value > 0 for value in figures.values())


def test_error_response_stops_the_measurement(port: int) -> None:
    with pytest.raises(BenchmarkError, match="/generate answered 400"):
        endpoint.load(port, endpoint.GENERATE_ROUTE, ["yes", "no"], clients=2, requests=4)


def test_time_idle_run_rejects_a_run_that_does_work() -> None:
    assert pipeline.time_idle_run([sys.executable, "-c", "print('Nothing has changed: all is well.')"], 2)
    assert pipeline.time_idle_run([sys.executable, "-c", "print('Starting Prefect ...')"], 1) is None


def test_copies_are_planted_of_each_kind_and_precision_is_counted() -> None:
    settings = NearDuplicates(shingle=2, min_jaccard=0.5, permutations=64, min_words=5)
    texts = [" ".join(f"w{number * place % 997}" for place in range(1, 60)) for number in range(1, 61)]
    planted = curation_run.plant(texts)
    assert len(planted) == 6
    assert sorted(len(text.split()) for text in planted) == [56, 56, 59, 59, 62, 62]
    documents = [*texts, *planted]
    assert curation_run.precision(documents, range(60, 66), settings) == 1
    assert curation_run.precision(["a b c d e f", "g h i j k l"], [1], settings) == 0
    assert curation_run.ours(documents, settings).tolist() == [False] * 60 + [True] * 6


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [("A rare, severe disease.", "the rare disease", 0.8), ("", "something", 0.0), ("X-linked", "xlinked", 1.0)],
)
def test_overlap_matches_expected_scores(reply: str, answer: str, expected: float) -> None:
    assert medquad_run.overlap(reply, answer) == pytest.approx(expected)


def test_an_answers_opening_ends_with_a_sentence() -> None:
    assert medquad.opening("Key Points\n - It is  rare. It is mild.") == "It is rare. It is mild."
    long = "It is rare. " + "word " * 100
    assert medquad.opening(long) == "It is rare."
    assert medquad.opening("word " * 100) is None


def test_lost_doubled_and_foreign_rankings_are_counted() -> None:
    ranker = ranking.Ranker(0, sent=["kept", "lost", "twice"], waits=[0.1, 0.2, 0.3], repeats=2)
    ranker.acknowledged = [("kept", 1.0), ("lost", 2.0), ("twice", 6.0)]
    stored = Counter(["kept", "twice", "twice", "foreign"])
    rows = {row.what: row for row in ranking.rows([ranker], stored, killed=5.0, again=9.0, seconds=10.0)}
    for row_name in ("acknowledged and not there", "there twice", "there and never sent"):
        assert (rows[row_name].ours, rows[row_name].met) == (1, False), row_name
    assert rows["acknowledged after the kill"].ours == 1
    assert rows["rankings acknowledged"].ours == 3


ALIGNED: dict[str, Any] = {
    "reward_mean": 1.5, "win_rate": 0.75, "win_rate_interval": [0.7, 0.8],
    "exact_match_heldout": 0.95, "distinct_2": 0.3, "kl_last": 2.0, "length_last": 15.0, "length_first": 12.0,
    "seconds": 60.0, "updates": 72, "rolled_back_to": None,
}  # fmt: skip


@pytest.mark.parametrize("name", alternatives.ALGORITHMS)
def test_compared_settings_are_valid_for_each_algorithm(name: str) -> None:
    params = read_settings(PROFILE)
    params["align"]["policy"] = alternatives.settings(name, params["align"]["policy"])
    check(params, stages=["align@policy"])
    assert params["align"]["policy"]["algorithm"]["name"] == name
    assert params["align"]["policy"]["algorithm"]["ptx"]["weight"] == 1.0


def test_worst_algorithm_is_compared_with_the_gates() -> None:
    tuned = {"reward_mean": 0.5, "exact_match_heldout": 0.97, "distinct_2": 0.4}
    results = {
        "ppo": ALIGNED,
        "grpo": {**ALIGNED, "reward_mean": 0.9, "exact_match_heldout": 0.9, "rolled_back_to": 3},
    }
    worst = {row.what: row for row in alternatives.rows(results, tuned) if row.target}
    assert [row.met for row in worst.values()] == [False, False, True]
    assert worst["held-out exact match lost, the most of the four"].ours == 7.0
    lines = alternatives.table(results, tuned).splitlines()
    assert lines[3].startswith("| PPO | 1.50 | 75.0 % (70–80) | 95.0 % | 0.30 | 2.00 | 15.0 | 60 |")
    assert len({line.count("|") for line in lines}) == 1
    assert "Rolled back to an earlier iteration: GRPO to 3." in alternatives.notes(results)
