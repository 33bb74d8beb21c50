"""The run report: complete, self-contained, safe for hostile text, and valid if parts are missing."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows import cli, graph, records, results
from flows.graph import GraphError
from flows.report import lineage, parts, plots
from flows.report import page as report
from flows.report.plots import Series
from flows.runner import Runner
from tests import report_fixtures as fixture
from tests.conftest import ROOT, Project
from tests.report_fixtures import RUN, put

SECTIONS = ["lineage", "data", "training", "evaluation", "reward", "alignment", "answers", "size", "stages", "limits"]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's ids, links and text; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        self.links += [attributes[name] or "" for name in ("href", "src", "xlink:href", "action") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run; DVC's graph is replaced by the fixture's."""
    monkeypatch.setattr(graph, "read", lambda project: fixture.graph())
    return fixture.make(tmp_path)


def write_report(project: Path, run: str = RUN) -> str:
    """Write the report and return the page."""
    return report.write_report(project, run).read_text(encoding="utf-8")


class TestPage:
    def test_report_is_written_to_the_run_and_as_latest(self, project: Path) -> None:
        path = report.write_report(project, RUN)
        assert path == project / "runs" / RUN / "report.html"
        assert path.read_bytes() == (project / "runs/latest.html").read_bytes()
        assert not list(project.glob("runs/**/.*"))

    def test_report_links_to_the_samples_page(self, project: Path) -> None:
        assert "samples.html" not in write_report(project)
        put(project / "data/compare/samples.html", {})
        report.write_report(project, RUN)
        for path in (project / "runs" / RUN / "report.html", project / "runs/latest.html"):
            (link,) = (link for link in Page(path.read_text(encoding="utf-8")).links if "samples" in link)
            assert (path.parent / link).resolve() == (project / "data/compare/samples.html").resolve()

    def test_report_shows_toxicity_before_and_after_alignment(self, project: Path) -> None:
        assert "Toxi" not in Page(write_report(project)).text
        scorecard = json.loads((project / "metrics/evaluate.json").read_text(encoding="utf-8"))
        scorecard["models"][1]["toxic_share"], scorecard["models"][2]["toxic_share"] = 0.25, 0.1
        put(project / "metrics/evaluate.json", {**scorecard, "toxicity": fixture.toxicity()})
        page = Page(write_report(project))
        assert "16 continuations per model of 8 prompts" in page.text
        assert "80 labelled texts of labelled.csv" in page.text
        assert "Its accuracy is 91.0 % on 20 held-out texts (majority class: 60.0 %), its AUC 0.950" in page.text
        assert "25.0 % mean 0.444 24.0 … 26.0 10.0 % mean 0.222 9.0 … 11.0 −15.0 −20.0 … −10.0" in page.text
        assert "<b>threat" in page.text
        assert "Toxic continuations" in page.text

    def test_report_loads_no_external_files_and_no_scripts(self, project: Path) -> None:
        text = write_report(project)
        page = Page(text)
        assert "default-src 'none'" in text
        assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
        assert not re.search(r"url\(|@import|@font-face|https?://", text)
        assert page.links
        assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)

    def test_report_contains_every_section_of_a_complete_run(self, project: Path) -> None:
        page = Page(write_report(project))
        assert [name for name in page.ids if name in SECTIONS] == SECTIONS
        assert "missing" not in write_report(project).partition("</style>")[2]
        for part in (
            "aaaaaaaaaaaa-bbbbbbbbbbbb", "1 of 3 gates passed", "16 stages ran", "2 January 2026, 03:04 UTC", "forge",
            "c0ffeec0ffee", "seed 1, device cpu, dtype decoder bfloat16",
            "countries==1.0", "several values", "damaged encoding", "12 345 training tokens in",
            "final held-out loss: 0.750", "reward mean of policy against tuned", "≥ 2", "81.0 %", "84.0 %", "target: 6",
            "held-out reply of int8", "changing reply of policy", "sampled reply of tuned", "[MASK]", "0.250 ×",
            "71.5 %", "65.0 … 78.0", "trained on 21 rankings that the others have", "77.0 %", "52.0 %", "is −0.25",
            "INT8 is 8.0 times as fast", "0.0050", "EUR", "The ratings are of single sentences.",
        ):  # fmt: skip
            assert part in page.text, part
        assert page.tags.count("svg") == 1 + 5 + 1 + 1 + 8  # lineage, losses, exact match, calibration, PPO's

    def test_text_from_data_is_escaped(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
        sources = json.loads((project / "data/ingest/sources.json").read_text())
        sources[0] |= {"name": evil, "licence": evil, "sha256": evil}
        put(project / "data/ingest/sources.json", sources)
        put(project / "data/package/provenance.json", {"model": evil})
        outcomes = {"package": {"status": "ran"}, evil: {"status": "failed", "message": evil}}
        put(project / "runs" / RUN / "flow.json", {"stages": outcomes})
        scorecard = json.loads((project / "metrics/evaluate.json").read_text())
        scorecard["gates"][0]["metric"] = scorecard["models"][3]["model"] = evil
        put(project / "metrics/evaluate.json", scorecard)
        replies = [fixture.answer("1", f"\x00\x1b\u202e{evil}", question=evil, reference=evil, entity=evil)]
        for model in ("tuned", "policy"):
            fixture.answers(project, model, replies)
        with (project / "data/ingest/rejected.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"source": "half a character \ud800", "row": evil, "reason": evil}) + "\n")
        text = write_report(project)
        page = Page(text)
        assert not {"script", "img"} & set(page.tags)
        assert page.text.count("<script>alert(1)</script>") >= 10
        assert not set("\x00\x1b\u202e") & set(text)

    def test_report_imports_no_training_libraries(self, project: Path) -> None:
        code = f"""
import sys
from pathlib import Path
from flows import graph
from flows.report import page as report
from tests import report_fixtures
graph.read = lambda project: report_fixtures.graph()
report.write_report(Path({str(project)!r}), {RUN!r})
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"torch", "transformers", "matplotlib", "prefect"}}, loaded
"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_page_names_the_algorithm_that_aligned_the_policy(project: Path) -> None:
    """PPO is named in the scorecard and in the section with the curves, unless the record has another algorithm."""
    text = Page(write_report(project)).text
    assert "aligned by PPO" in text
    assert "KL coefficient" in text
    record = project / "data/align/policy/record.json"
    put(record, json.loads(record.read_text(encoding="utf-8")) | {"settings": {"algorithm": {"name": "grpo"}}})
    text = Page(write_report(project)).text
    assert "aligned by GRPO" in text
    assert "aligned by PPO" not in text
    assert "KL coefficient" not in text


class TestMissingParts:
    @pytest.mark.parametrize(
        ("missing", "sentence"),
        [
            ("data/ingest", "No sources have been read yet"),
            ("data/validate", "The tables have not been validated yet"),
            ("metrics/evaluate.json", "No model has been evaluated yet"),
            ("data/compare", "No model has been evaluated yet"),  # git's figures are another run's
            ("metrics/reward@train.json", "No reward model has been trained"),
            ("data/reward", "No reward model has been trained"),
            ("data/align/policy/history.csv", "No curves: no model has been aligned"),
            ("data/evaluate", "No model has answered the questions yet"),
            ("data/package", "No model was packaged"),
        ],
    )
    def test_section_without_results_shows_a_sentence(self, project: Path, missing: str, sentence: str) -> None:
        path = project / missing
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        page = Page(write_report(project))
        assert sentence in page.text
        assert [name for name in page.ids if name in SECTIONS] == SECTIONS

    def test_report_without_any_run_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph, "read", lambda project: fixture.graph())
        page = Page(write_report(tmp_path))
        assert "16 stages not run" in page.text
        assert "No loss curves" in page.text
        assert "could not be made" not in page.text

    def test_if_dvc_cannot_read_the_project_the_other_sections_remain(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(project: Path) -> graph.Graph:
            raise GraphError("dvc.yaml is cut off")

        monkeypatch.setattr(graph, "read", refuse)
        page = Page(write_report(project))
        assert "No diagram: dvc.yaml is cut off" in page.text
        assert "97.5 %" in page.text

    def test_a_malformed_file_affects_only_its_section(self, project: Path) -> None:
        put(project / "metrics/reward@train.json", {"gap_at_least_1": 3})
        page = Page(write_report(project))
        assert "This section could not be made from the files of the run (AttributeError" in page.text
        assert "target: 6" in page.text

    def test_a_validation_report_of_version_0_1_is_shown(self, project: Path) -> None:
        path = project / "data/validate/report/validation.json"
        tables = [{"refused" if key == "rejected" else key: value for key, value in table.items()}
                  for table in json.loads(path.read_text(encoding="utf-8"))]  # fmt: skip
        put(path, tables)
        page = Page(write_report(project))
        assert "could not be made" not in page.text
        assert "998" in page.text

    def test_failed_run_shows_stage_and_error(self, project: Path) -> None:
        put(project / "runs" / RUN / "flow.json", {"stages": {"package": {"status": "failed", "message": "1 gate"}}})
        page = Page(write_report(project))
        assert "No model was packaged since aaaaaaaaaaaa-bbbbbbbbbbbb" in page.text
        assert "package failed. 1 gate" in page.text

    def test_outdated_results_are_marked(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reasons = {"align@policy": "params: align.policy.iterations 3 → 4"}
        monkeypatch.setattr(graph, "read", lambda project: fixture.graph(reasons))
        page = Page(write_report(project))
        assert "Some results are out of date" in page.text
        assert "align@policy (params: align.policy.iterations 3 → 4)" in page.text
        assert "compare (a stage that it needs is out of date)" in page.text
        assert "finetune@chat (" not in page.text
        assert "1 of 3 gates passed in an earlier run" in page.text
        assert "✗ 1 of 3 gates" not in page.text


class TestFigures:
    def test_the_judge_is_compared_with_the_reward_model_on_ranked_only_pairs(self, project: Path) -> None:
        text = Page(write_report(project)).text
        assert re.search(r"ranked only ?30 pairs 62\.5 % model 70\.3 % judge 60\.0 % words", text)

    def test_a_change_is_marked_by_its_paired_interval(self, project: Path) -> None:
        text = write_report(project)
        rows = {
            name: "".join(part.partition("</tr>")[0] for part in text.split(f"</i>{name}<span")[1:])
            for name in ("policy", "int8")
        }
        assert re.search(r'step cost">▼ −4\.0<.*step flat">▲ \+1\.0<.*step gain">▲ \+1\.25', rows["policy"], re.DOTALL)
        assert re.findall(r'step \w+">[^<]*', rows["int8"]) == ['step gain">▼ −75 %']

    def test_figures_of_named_evaluations_and_tasks_have_columns(self, project: Path) -> None:
        """With the standard error of a task, raw intervals of figures that are no shares, and reasons."""
        page = Page(write_report(project))
        assert "wide: Bits per byte of held-out text" in page.text
        assert "my_task: acc" in page.text
        assert "0.51 ± 0.012" in page.text
        assert "1.23 1.10 … 1.40" in page.text
        assert "Declined, out of scope" in page.text
        assert "no conversation" in page.text  # the gate without a value

    def test_scores_by_seen_text_and_what_applies_are_shown(self, project: Path) -> None:
        page = Page(write_report(project))
        assert "Exact match, held-out entities tuned – 95.0 % 60 items 75.0 % 12 items policy – 95.0 %" in page.text
        assert "wide text Models with a corpus. encoder: no <corpus>" in page.text
        assert "harness lm_eval 0.4.13 Any task." in page.text
        assert "tuned policy answer loss −0.25 −0.50 … −0.12" in page.text

    def test_preferences_and_their_gain_are_shown(self, project: Path) -> None:
        text = Page(write_report(project)).text
        assert all(words in text for words in ("Preferred replies likelier", "62.5 %", "Preferred replies gained more"))
        assert "55.0 … 73.0" in text

    def test_gain_of_an_alignment_without_a_judge_is_that_of_its_pairs(self, project: Path) -> None:
        path = project / "metrics/evaluate.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        for model in found["models"]:
            model.pop("win_rate", None)
        put(path, found)
        assert "of held-out preference pairs ordered as people did" in Page(write_report(project)).text

    def test_what_a_project_has_not_is_not_shown(self, project: Path) -> None:
        """Neither questions about entities without short answers, nor tables and tokens without rows."""
        page = Page(write_report(project)).text
        assert "about seen and about held-out entities each" in page
        path = project / "metrics/evaluate.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        for model in found["models"]:
            model.pop("exact_match_seen", None)
        put(path, found)
        tokens = json.loads((project / "metrics/tokenize.json").read_text(encoding="utf-8"))
        put(project / "metrics/tokenize.json", {**tokens, "train": {**tokens["train"], "documents": 0}})
        page = Page(write_report(project)).text
        assert "about seen and about held-out entities each" not in page
        assert "training tokens in" not in page

    def test_cost_is_time_by_price_and_parallel_stages_share_elapsed_time(self, project: Path) -> None:
        page = Page(write_report(project))
        assert "sum of all stages 9 min 36 s 500 MB 0.0800" in page.text
        assert "elapsed time, up to 2 in parallel 51 s 0.0071" in page.text

    def test_logs_of_another_recipe_are_ignored(self, project: Path) -> None:
        fixture.log(project, "run-later", "finetune@chat", "another recipe", "2027-01-01T00:00:00+00:00", 9999.0)
        assert "9999" not in write_report(project)
        assert results.Results(project, RUN).steps["finetune@chat"].seconds == 36.0

    def test_rejected_rows_are_counted_by_reason_without_their_place(self, project: Path) -> None:
        reasons = [f"docs/my, file.jsonl, line {number}: an empty answer" for number in range(1, 8)]
        rows = [{"source": "stars", "row": "{}", "reason": reason} for reason in reasons]
        rows += [
            {"source": "docs", "row": f"docs/{name}", "reason": f"docs/{name}: an image; only text can be read"}
            for name in ("a.png", "b.png")
        ]
        path = project / "data/ingest/rejected.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rejected = parts.data(results.Results(project, RUN))["rejected"]
        assert [(item["reason"], item["count"], len(item["examples"])) for item in rejected] == [
            ("an empty answer", 7, 3), ("an image; only text can be read", 2, 2)
        ]  # fmt: skip

    def test_unknown_licences_and_notes_are_listed(self, project: Path) -> None:
        path = project / "data/ingest/sources.json"
        sources = json.loads(path.read_text())
        assert "licence unknown" not in write_report(project)
        sources[1] |= {"licence": "unknown", "notes": ["a.csv: not UTF-8, read as windows-1252"]}
        put(path, sources)
        text = Page(write_report(project)).text
        assert "licence unknown: stars" in text
        assert "stars: a.csv: not UTF-8" in text

    def test_limits_follow_from_the_sources(self, project: Path) -> None:
        page = Page(write_report(project))
        assert "In stars people rated sentences by themselves" in page.text
        assert "every entity of countries" in page.text
        assert "A bag of words is more accurate." in page.text
        record = json.loads((project / "data/ingest/record.json").read_text())
        record["settings"] = {"sources": [{"name": "countries", "kind": "datasets", "table": "corpus"}]}
        put(project / "data/ingest/record.json", record)
        page = Page(write_report(project))
        assert "single sentences" not in page.text
        assert "held-out documents of countries" in page.text

    @pytest.mark.parametrize(
        ("words", "pairs", "note"),
        [
            (0.84, 0.80, "A bag of words is more accurate."),
            (0.80, 0.81, "A bag of words and their pairs is as accurate."),
            (0.80, None, None),
        ],
    )
    def test_better_bag_of_words_is_listed_as_a_limit(
        self, words: float, pairs: float | None, note: str | None, project: Path
    ) -> None:
        gap = {"pairs": 120, "model": 0.81, "bag_of_words": words, "bag_of_words_and_bigrams": pairs}
        put(project / "metrics/reward@train.json", {"rankings": 51, "gap_at_least_1": gap})
        page = Page(write_report(project))
        assert f"{100 * words:.1f} % words" in page.text
        assert ("% word pairs" in page.text) == (pairs is not None)
        assert (note is None) == ("A bag of words" not in page.text)
        assert note is None or note in page.text

    @pytest.mark.parametrize(
        ("value", "kind", "expected"),
        [
            (None, "share", "–"), (0.9751, "share", "97.5 %"), (-0.001, "points", "0.00"), (1.5, "points", "+1.50"),
            (21084.03, "number", "21\u202f084"), (20.0, "number", "20.00"), (2_090_000, "bytes", "2.09 MB"),
        ],
    )  # fmt: skip
    def test_figures_are_formatted_by_kind(self, value: float | None, kind: str, expected: str) -> None:
        assert report.figure(value, kind) == expected
        assert report.change(111.7, "relative") == "× 113"
        assert (report.change(0.003, "relative"), report.change(-0.28, "relative")) == ("+0.3 %", "−28 %")
        assert report.span(3725) == "1 h 02 min"


class TestRows:
    def test_a_row_is_joined_with_the_newest_run_that_made_its_model(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = json.loads((project / "data/finetune/chat/record.json").read_text())["recipe"]
        again = {"tokens_per_second": 6000, "peak_memory_bytes": 7}
        fixture.log(project, "run-2", "finetune@chat", recipe, "2026-02-01T00:00:00+00:00", 30.0, **again)
        fixture.log(project, "run-3", "finetune@chat", "another recipe", "2026-03-01T00:00:00+00:00", 99.0)
        monkeypatch.chdir(project)
        (project / "dvc.yaml").touch()
        done = CliRunner().invoke(cli.cli, ["report", "--json"])
        rows = {row["model"]: row for row in json.loads(done.output)}
        assert list(rows) == ["encoder", "tuned", "policy", "int8"]
        figures_by_model = {
            name: tuple(row[figure] for figure in records.MEASURED_FIGURES) for name, row in rows.items()
        }
        assert figures_by_model["tuned"] == (6000, 30.0, 7)
        assert figures_by_model["policy"] == (None, 36.0, 500_000_000)
        assert figures_by_model["int8"] == (400.0, 36.0, 500_000_000)
        assert rows["tuned"]["exact_match_seen_interval"] == [0.96, 0.99]

    def test_a_model_without_logs_has_no_measured_figures(self, project: Path) -> None:
        shutil.rmtree(project / "runs")
        assert all(
            row[figure] is None for row in records.scorecard_rows(project) for figure in records.MEASURED_FIGURES
        )

    def test_last_run_is_the_run_of_the_current_results(self, project: Path) -> None:
        assert results.last_run(project) == RUN
        fixture.log(project, "run-in-a-worktree", "align@policy", "another recipe", "2027-01-01T00:00:00+00:00", 1.0)
        assert results.last_run(project) == RUN
        put(project / "runs/run-that-did-nothing/flow.json", {"stages": {}})
        assert results.last_run(project) == "run-that-did-nothing"
        assert report.write_last_report(project).parent.name == "run-that-did-nothing"

    def test_missing_run_error_names_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(report.ReportError, match="run `bessemer run` first"):
            report.write_last_report(tmp_path)


class TestDrawing:
    def test_diagram_matches_the_dvc_graph(self, toy: Project) -> None:
        Runner(toy.path, "run-test").run("source", lambda text: None, lambda percent, text: None)
        text = write_report(toy.path, "run-test")
        boxes = re.findall(r'<a class="box ([\w-]+)" href="#stages"><title>([\w@]+): ', text)
        assert [name for _, name in boxes] == ["source", "side@left", "side@right", "join"]
        assert text.count("</a>") > 4

    def test_boxes_and_edges_never_overlap_and_run_from_left_to_right(self) -> None:
        layout = lineage.layout(fixture.NEEDS)
        assert layout.boxes.keys() == fixture.NEEDS.keys()
        ends = {point: name for name, point in layout.boxes.items()}
        assert {(ends[edge[0]], ends[edge[-1]]) for edge in layout.edges} == {
            (need, name) for name, own in lineage.direct_needs(fixture.NEEDS).items() for need in own
        }
        step = lineage.WIDTH + lineage.GAP_X
        assert all(b[0] - a[0] == pytest.approx(step) for edge in layout.edges for a, b in pairwise(edge))
        bends = {point for edge in layout.edges for point in edge[1:-1]}
        for (x, y), (other, height) in combinations([*layout.boxes.values(), *bends], 2):
            boxes = ((x, y) not in bends) + ((other, height) not in bends)
            assert x != other or abs(y - height) >= boxes * lineage.HEIGHT / 2

    def test_edges_rarely_cross_unnecessarily(self) -> None:
        """Two reward models for three scorecards cross three times."""
        assert lineage.crossings(lineage.layout(fixture.NEEDS).edges) <= 1 + 3

    def test_diagram_is_the_same_in_every_process(self) -> None:
        code = "from flows.report import lineage; from tests.report_fixtures import NEEDS; print(lineage.layout(NEEDS))"
        diagrams = {
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                capture_output=True, text=True,
            ).stdout
            for seed in ("1", "2")
        }  # fmt: skip
        assert len(diagrams) == 1

    def test_disconnected_graphs_are_stacked(self) -> None:
        layout = lineage.layout({"a": (), "b": ("a",), "c": (), "d": ("not selected",)})
        assert layout.boxes["a"][1] == layout.boxes["b"][1]
        heights = sorted({y for _, y in layout.boxes.values()})
        assert len(heights) == 3
        assert all(below - above >= lineage.HEIGHT for above, below in pairwise(heights))
        assert min(heights) > lineage.HEIGHT / 2

    def test_layout_omits_transitive_dependencies(self) -> None:
        needs = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ("a", "b", "c", "not selected")}
        assert lineage.direct_needs(needs) == {"a": [], "b": ["a"], "c": ["b"], "d": ["c"]}

    def test_lines_skip_non_finite_values(self) -> None:
        points = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]
        svg = plots.line([Series("loss", "s1", points)], "step", "nats")
        assert svg.count("nan") == svg.count("inf") == 0
        assert re.search(r'class="line s1" d="M[\d. ]+L[\d. ]+"', svg)
        assert plots.line([Series("loss", "s1", points[1:3])], "step", "nats") == ""

    @pytest.mark.parametrize(
        ("values", "ticks"),
        [((0, 60), (0, 20, 40, 60)), ((1, 3), (1, 2, 3)), ((0.0, 0.02), (0, 0.005, 0.01, 0.015, 0.02))],
    )
    def test_ticks_are_round(self, values: tuple[float, float], ticks: tuple[float, ...]) -> None:
        axis = plots.Axis.over(values, whole=all(isinstance(value, int) for value in values))
        assert axis.ticks == pytest.approx(ticks)
        assert (axis.low, axis.high) == (ticks[0], ticks[-1])

    def test_a_flat_line_has_an_axis(self) -> None:
        axis = plots.Axis.over([5.0, 5.0])
        assert axis.low < 5 < axis.high
