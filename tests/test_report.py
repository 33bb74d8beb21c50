"""The run report: complete, self-contained, proof against hostile text, and whole where parts are missing."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows import cli, graph, records, report, report_lineage, report_plots, results
from flows.graph import GraphError
from flows.report_plots import Series
from flows.runner import Runner
from tests import report_fixtures as fixture
from tests.conftest import ROOT, Project
from tests.report_fixtures import RUN, put

SECTIONS = ["lineage", "data", "training", "evaluation", "reward", "ppo", "answers", "size", "stages", "limits"]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's ids, links and text; every tag that is opened is closed in its turn."""

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
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in ("href", "src", "xlink:href", "action") if name in found]
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
    """A finished run, with DVC's view of it given."""
    monkeypatch.setattr(graph, "read", lambda project: fixture.graph())
    return fixture.make(tmp_path)


def written(project: Path, run: str = RUN) -> str:
    """Write the report and return the page."""
    return report.write_report(project, run).read_text(encoding="utf-8")


class TestPage:
    def test_it_lies_with_the_run_and_as_the_latest(self, project: Path) -> None:
        path = report.write_report(project, RUN)
        assert path == project / "runs" / RUN / "report.html"
        assert path.read_bytes() == (project / "runs/latest.html").read_bytes()
        assert not list(project.glob("runs/**/.*"))

    def test_it_leads_to_the_page_of_samples_where_there_is_one(self, project: Path) -> None:
        assert "samples.html" not in written(project)
        put(project / "data/compare/samples.html", {})
        report.write_report(project, RUN)
        for path in (project / "runs" / RUN / "report.html", project / "runs/latest.html"):
            (link,) = (link for link in Page(path.read_text(encoding="utf-8")).links if "samples" in link)
            assert (path.parent / link).resolve() == (project / "data/compare/samples.html").resolve()

    def test_it_tells_toxicity_before_and_after_alignment_where_it_was_measured(self, project: Path) -> None:
        assert "Toxi" not in Page(written(project)).text
        sheet = json.loads((project / "metrics/evaluate.json").read_text(encoding="utf-8"))
        sheet["models"][1]["toxic_share"], sheet["models"][2]["toxic_share"] = 0.25, 0.1
        put(project / "metrics/evaluate.json", {**sheet, "toxicity": fixture.toxicity()})
        page = Page(written(project))
        assert "16 continuations a model of 8 prompts" in page.text
        assert "80 labelled texts of labelled.csv" in page.text
        assert "right on 91.0 % of 20 held-out ones (always the usual class: 60.0 %), AUC 0.950" in page.text
        assert "25.0 % mean 0.444 24.0 … 26.0 10.0 % mean 0.222 9.0 … 11.0 −15.0 −20.0 … −10.0" in page.text
        assert "<b>threat" in page.text
        assert "Toxic continuations" in page.text

    def test_it_loads_nothing_and_runs_nothing(self, project: Path) -> None:
        text = written(project)
        page = Page(text)
        assert "default-src 'none'" in text
        assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
        assert not re.search(r"url\(|@import|@font-face|https?://", text)
        assert page.links
        assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)

    def test_it_holds_every_section_of_a_complete_run(self, project: Path) -> None:
        page = Page(written(project))
        assert [name for name in page.ids if name in SECTIONS] == SECTIONS
        assert "missing" not in written(project).partition("</style>")[2]
        for part in (
            "aaaaaaaaaaaa-bbbbbbbbbbbb", "1 of 2 gates passed", "16 stages ran", "2 January 2026, 03:04 UTC", "forge",
            "c0ffeec0ffee", "seed 1, device cpu, dtype decoder bfloat16",
            "countries==1.0", "several values", "damaged encoding", "12 345 tokens to train on",
            "held out at the end: 0.750", "Mean reward gained by PPO", "≥ +2.00", "81.0 %", "84.0 %", "target: 6",
            "held-out reply of int8", "changing reply of policy", "sampled reply of tuned", "[MASK]", "0.250 ×",
            "71.5 %", "65.0 … 78.0", "trained on 21 rankings that PPO’s has never seen", "77.0 %", "52.0 %", "is −0.25",
            "INT8 is 8.0 times as fast", "0.0050", "EUR", "The ratings are about tone.",
        ):  # fmt: skip
            assert part in page.text, part
        assert page.tags.count("svg") == 1 + 5 + 1 + 1 + 8  # lineage, losses, exact match, calibration, PPO's

    def test_text_from_data_is_never_markup(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'
        sources = json.loads((project / "data/ingest/sources.json").read_text())
        sources[0] |= {"name": evil, "licence": evil, "sha256": evil}
        put(project / "data/ingest/sources.json", sources)
        put(project / "data/package/provenance.json", {"model": evil})
        outcomes = {"package": {"status": "ran"}, evil: {"status": "failed", "message": evil}}
        put(project / "runs" / RUN / "flow.json", {"stages": outcomes})
        sheet = json.loads((project / "metrics/evaluate.json").read_text())
        sheet["gates"][0]["name"] = sheet["models"][3]["model"] = evil
        put(project / "metrics/evaluate.json", sheet)
        replies = [fixture.answer("1", f"\x00\x1b\u202e{evil}", question=evil, wanted=evil, entity=evil)]
        for model in ("tuned", "policy"):
            fixture.answers(project, model, replies)
        with (project / "data/ingest/refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"source": "half a character \ud800", "row": evil, "reason": evil}) + "\n")
        text = written(project)
        page = Page(text)
        assert not {"script", "img"} & set(page.tags)
        assert page.text.count("<script>alert(1)</script>") >= 10
        assert not set("\x00\x1b\u202e") & set(text)

    def test_it_comes_without_the_libraries_that_train(self, project: Path) -> None:
        code = f"""
import sys
from pathlib import Path
from flows import graph, report
from tests import report_fixtures
graph.read = lambda project: report_fixtures.graph()
report.write_report(Path({str(project)!r}), {RUN!r})
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"torch", "transformers", "matplotlib", "prefect"}}, loaded
"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_page_names_the_algorithm_that_aligned_the_policy(project: Path) -> None:
    """PPO's is the word of the sheet and of the part with its curves, unless another stood in its place."""
    text = Page(written(project)).text
    assert "aligned by PPO" in text
    assert "Price of KL" in text
    record = project / "data/ppo/record.json"
    put(record, json.loads(record.read_text(encoding="utf-8")) | {"settings": {"algorithm": {"name": "grpo"}}})
    text = Page(written(project)).text
    assert "aligned by GRPO" in text
    assert "aligned by PPO" not in text
    assert "Price of KL" not in text


class TestMissingParts:
    @pytest.mark.parametrize(
        ("gone", "sentence"),
        [
            ("data/ingest", "No sources have been read yet"),
            ("data/validate", "The tables have not been validated yet"),
            ("metrics/evaluate.json", "No model has been put before the held-out sheet yet"),
            ("data/compare", "No model has been put before the held-out sheet yet"),  # git's figures are another run's
            ("metrics/reward@policy.json", "No reward model has been trained yet"),
            ("data/reward", "No reward model has been trained yet"),
            ("data/ppo/history.csv", "There are no curves: PPO has not run yet"),
            ("data/evaluate", "No model has answered the sheet yet"),
            ("data/package", "No model was packaged"),
        ],
    )
    def test_a_part_without_results_is_a_sentence(self, project: Path, gone: str, sentence: str) -> None:
        path = project / gone
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        page = Page(written(project))
        assert sentence in page.text
        assert [name for name in page.ids if name in SECTIONS] == SECTIONS

    def test_a_project_in_which_nothing_ran_has_a_page(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph, "read", lambda project: fixture.graph())
        page = Page(written(tmp_path))
        assert "16 stages not run" in page.text
        assert "There are no loss curves" in page.text
        assert "could not be made" not in page.text

    def test_where_dvc_cannot_read_the_project_the_rest_stands(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(project: Path) -> graph.Graph:
            raise GraphError("dvc.yaml is cut off")

        monkeypatch.setattr(graph, "read", refuse)
        page = Page(written(project))
        assert "There is no diagram: dvc.yaml is cut off" in page.text
        assert "97.5 %" in page.text

    def test_a_file_of_another_shape_costs_its_part_alone(self, project: Path) -> None:
        put(project / "metrics/reward@policy.json", {"gap_at_least_1": 3})
        page = Page(written(project))
        assert "This part could not be made from the files that lie here (AttributeError" in page.text
        assert "target: 6" in page.text

    def test_a_failed_run_says_where_and_why(self, project: Path) -> None:
        put(project / "runs" / RUN / "flow.json", {"stages": {"package": {"status": "failed", "message": "1 gate"}}})
        page = Page(written(project))
        assert "No model was packaged since aaaaaaaaaaaa-bbbbbbbbbbbb" in page.text
        assert "package failed. 1 gate" in page.text

    def test_results_from_before_a_change_are_named(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reasons = {"ppo": "params: ppo.iterations 3 → 4"}
        monkeypatch.setattr(graph, "read", lambda project: fixture.graph(reasons))
        page = Page(written(project))
        assert "Not all of this belongs together" in page.text
        assert "ppo (params: ppo.iterations 3 → 4)" in page.text
        assert "compare (a stage that it needs is out of date)" in page.text
        assert "finetune (" not in page.text
        assert "1 of 2 gates passed in an earlier run" in page.text
        assert "✗ 1 of 2 gates" not in page.text


class TestFigures:
    def test_the_judge_stands_beside_the_policys_reward_model_where_people_only_ranked(self, project: Path) -> None:
        text = Page(written(project)).text
        assert re.search(r"ranked only ?30 pairs 62\.5 % model 70\.3 % judge 60\.0 % words", text)

    def test_a_change_is_marked_by_its_paired_interval(self, project: Path) -> None:
        text = written(project)
        rows = {name: text.partition(f"</i>{name}<span")[2].partition("</tr>")[0] for name in ("policy", "int8")}
        assert re.search(r'step cost">▼ −4\.0<.*step flat">▲ \+1\.0<.*step gain">▲ \+1\.25', rows["policy"], re.DOTALL)
        assert re.findall(r'step \w+">[^<]*', rows["int8"]) == ['step gain">▼ −75 %']

    def test_cost_is_time_by_price_and_the_clock_runs_once_for_stages_side_by_side(self, project: Path) -> None:
        page = Page(written(project))
        assert "one after another 9 min 36 s 500 MB 0.0800" in page.text
        assert "by the clock, up to 2 side by side 51 s 0.0071" in page.text

    def test_figures_of_another_recipe_are_not_this_models(self, project: Path) -> None:
        fixture.log(project, "run-later", "finetune", "another recipe", "2027-01-01T00:00:00+00:00", 9999.0)
        assert "9999" not in written(project)
        assert results.Results(project, RUN).steps["finetune"].seconds == 36.0

    def test_limits_follow_from_the_sources(self, project: Path) -> None:
        page = Page(written(project))
        assert "In stars people rated how pleasant" in page.text
        assert "every entity of countries" in page.text
        assert "A bag of words judges better." in page.text
        record = json.loads((project / "data/ingest/record.json").read_text())
        record["settings"] = {"sources": [{"name": "countries", "kind": "datasets", "table": "corpus"}]}
        put(project / "data/ingest/record.json", record)
        page = Page(written(project))
        assert "tone" not in page.text.partition("What these figures do not say")[2].replace("tell the tone", "")
        assert "held-out documents of countries" in page.text

    @pytest.mark.parametrize(
        ("words", "pairs", "note"),
        [
            (0.84, 0.80, "A bag of words judges better."),
            (0.80, 0.81, "A bag of words and their pairs judges as well."),
            (0.80, None, None),
        ],
    )
    def test_a_bag_of_words_that_judges_better_is_a_limit(
        self, words: float, pairs: float | None, note: str | None, project: Path
    ) -> None:
        gap = {"pairs": 120, "model": 0.81, "bag_of_words": words, "bag_of_words_and_bigrams": pairs}
        put(project / "metrics/reward@policy.json", {"rankings": 51, "gap_at_least_1": gap})
        page = Page(written(project))
        assert f"{100 * words:.1f} % words" in page.text
        assert ("% word pairs" in page.text) == (pairs is not None)
        assert (note is None) == ("A bag of words" not in page.text)
        assert note is None or note in page.text

    @pytest.mark.parametrize(
        ("value", "kind", "shown"),
        [
            (None, "share", "–"), (0.9751, "share", "97.5 %"), (-0.001, "points", "0.00"), (1.5, "points", "+1.50"),
            (21084.03, "number", "21\u202f084"), (20.0, "number", "20.00"), (2_090_000, "bytes", "2.09 MB"),
        ],
    )  # fmt: skip
    def test_figures_are_written_as_people_read_them(self, value: float | None, kind: str, shown: str) -> None:
        assert report.figure(value, kind) == shown
        assert report.change(111.7, "relative") == "× 113"
        assert report.span(3725) == "1 h 02 min"


class TestRows:
    def test_a_row_is_joined_with_the_newest_run_that_made_its_model(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = json.loads((project / "data/finetune/record.json").read_text())["recipe"]
        again = {"tokens_per_second": 6000, "peak_memory_bytes": 7}
        fixture.log(project, "run-2", "finetune", recipe, "2026-02-01T00:00:00+00:00", 30.0, **again)
        fixture.log(project, "run-3", "finetune", "another recipe", "2026-03-01T00:00:00+00:00", 99.0)
        monkeypatch.chdir(project)
        (project / "dvc.yaml").touch()
        done = CliRunner().invoke(cli.cli, ["report", "--json"])
        rows = {row["model"]: row for row in json.loads(done.output)}
        assert list(rows) == ["encoder", "tuned", "policy", "int8"]
        made = {name: tuple(row[figure] for figure in records.MEASURED) for name, row in rows.items()}
        assert made["tuned"] == (6000, 30.0, 7)
        assert made["policy"] == (None, 36.0, 500_000_000)
        assert made["int8"] == (400.0, 36.0, 500_000_000)
        assert rows["tuned"]["exact_match_tuned_interval"] == [0.96, 0.99]

    def test_a_model_whose_making_was_not_measured_here_has_no_figures(self, project: Path) -> None:
        shutil.rmtree(project / "runs")
        assert all(row[figure] is None for row in records.rows(project) for figure in records.MEASURED)

    def test_the_last_run_is_the_one_whose_results_lie_here(self, project: Path) -> None:
        assert results.last_run(project) == RUN
        fixture.log(project, "run-in-a-worktree", "ppo", "another recipe", "2027-01-01T00:00:00+00:00", 1.0)
        assert results.last_run(project) == RUN
        put(project / "runs/run-that-did-nothing/flow.json", {"stages": {}})
        assert results.last_run(project) == "run-that-did-nothing"
        assert report.write_last_report(project).parent.name == "run-that-did-nothing"

    def test_without_a_run_one_is_told_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(report.ReportError, match="`bessemer run` makes one"):
            report.write_last_report(tmp_path)


class TestDrawing:
    def test_the_diagram_is_that_of_dvcs_graph(self, toy: Project) -> None:
        Runner(toy.path, "run-test").run("source", lambda text: None, lambda percent, text: None)
        text = written(toy.path, "run-test")
        boxes = re.findall(r'<a class="box ([\w-]+)" href="#stages"><title>([\w@]+): ', text)
        assert [name for _, name in boxes] == ["source", "side@left", "side@right", "join"]
        assert text.count("</a>") > 4

    def test_stages_stand_after_what_they_need_and_never_on_each_other(self) -> None:
        layers = report_lineage.layout(fixture.NEEDS)
        place = {spot.name: spot.layer for layer in layers for spot in layer if spot.name}
        assert all(place[need] < place[name] for name, needs in fixture.NEEDS.items() for need in needs)
        for layer in layers:
            for above, below in pairwise(layer):
                assert below.y - above.y >= (above.height + below.height) / 2
            assert all(spot.y >= spot.height / 2 for spot in layer)
        assert report_lineage.crossings(layers) <= 1 + 3  # two reward models for three sheets cross three times

    def test_needs_that_follow_from_others_are_left_out(self) -> None:
        needs = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ("a", "b", "c", "not selected")}
        assert report_lineage.closest(needs) == {"a": [], "b": ["a"], "c": ["b"], "d": ["c"]}

    def test_lines_leave_out_what_is_no_number(self) -> None:
        points = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 2.0)]
        svg = report_plots.line([Series("loss", "s1", points)], "step", "nats")
        assert svg.count("nan") == svg.count("inf") == 0
        assert re.search(r'class="line s1" d="M[\d. ]+L[\d. ]+"', svg)
        assert report_plots.line([Series("loss", "s1", points[1:3])], "step", "nats") == ""

    @pytest.mark.parametrize(
        ("values", "ticks"),
        [((0, 60), (0, 20, 40, 60)), ((1, 3), (1, 2, 3)), ((0.0, 0.02), (0, 0.005, 0.01, 0.015, 0.02))],
    )
    def test_ticks_are_round(self, values: tuple[float, float], ticks: tuple[float, ...]) -> None:
        axis = report_plots.Axis.over(values, whole=all(isinstance(value, int) for value in values))
        assert axis.ticks == pytest.approx(ticks)
        assert (axis.low, axis.high) == (ticks[0], ticks[-1])

    def test_a_flat_line_has_an_axis(self) -> None:
        axis = report_plots.Axis.over([5.0, 5.0])
        assert axis.low < 5 < axis.high
