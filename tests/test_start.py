"""`bessemer init`: what a new project contains, and the pipeline that it proposes for what the user brings."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from flows import cli, graph
from flows.start import command, machine, params_text, project
from flows.start.brought import Brought, Table
from flows.start.checkpoint import Checkpoint, read_checkpoint
from flows.start.machine import Machine
from flows.start.pipeline import STAGE_MINUTES, design
from flows.start.tables import read_table
from tasks.common.settings import BessemerError
from tests.foreign_fixtures import write_foreign

MACHINE = Machine(cores=2, device="cpu", training_flops=1e11)
FAST = Machine(cores=2, device="cpu", training_flops=1e18)


def table(rows: int = 400, characters: float = 350.0) -> Table:
    return Table(rows, characters, 4000, ({"name": "mine", "kind": "files", "path": "mine.jsonl"},))


def checkpoint(kind: str = "causal", parameters: int = 135_000_000, context: int = 8192) -> Checkpoint:
    return Checkpoint(Path("mine"), kind, parameters, context, "apache-2.0", chat_template=True)


def text() -> str:
    """Return the params.yaml of a project that only serves a checkpoint."""
    return params_text.render("mine", design(Brought(checkpoint()), MACHINE).sections)


class TestProject:
    def test_project_is_complete_and_committed(self, tmp_path: Path) -> None:
        with project.new_project(tmp_path / "new") as path:
            (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
            project.copy_in(path, {"data/sources/rows.jsonl": tmp_path / "rows.jsonl"})
            (path / "params.yaml").write_text(text(), encoding="utf-8")
            project.commit(path, ["data/sources/rows.jsonl"], "First")
        new = tmp_path / "new"
        assert not list(tmp_path.glob(".new-*"))
        log = subprocess.run(["git", "log", "--format=%s"], cwd=new, capture_output=True, text=True, check=True)
        assert log.stdout == "First\n"
        status = subprocess.run(["git", "status", "--short"], cwd=new, capture_output=True, text=True, check=True)
        assert status.stdout == ""
        assert list(graph.read(new)) == ["code", "quantize@chat", "package"]

    def test_large_files_are_copied_with_progress_and_tracked_by_dvc(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(project, "BAR_DELAY_S", 0)
        (tmp_path / "big.txt").write_bytes(b"x" * (project.LARGE_FILE_BYTES + 1))
        with project.new_project(tmp_path / "new") as path:
            project.copy_in(path, {"data/sources/big.txt": tmp_path / "big.txt"})
            (path / "params.yaml").write_text(text(), encoding="utf-8")
            graph.read(path)  # would tell DVC that there is no git
            project.commit(path, ["data/sources/big.txt"], "First")
        printed = capsys.readouterr()
        assert "copying: " in printed.err
        assert printed.out == "adding data/sources/big.txt to DVC\n"
        tracked = subprocess.run(
            ["git", "ls-files", "data/sources"], cwd=tmp_path / "new", capture_output=True, text=True
        )
        assert "data/sources/big.txt.dvc" in tracked.stdout.splitlines()
        assert "data/sources/big.txt" not in tracked.stdout.splitlines()
        assert not graph.read(tmp_path / "new")["data/sources/big.txt.dvc"].dirty

    def test_failure_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with pytest.raises(BessemerError, match="could not be copied"), project.new_project(tmp_path / "new") as path:
            project.copy_in(path, {"models/none": tmp_path / "none"})
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder_is_copied_writable(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_text("{}", encoding="utf-8")
        (tmp_path / "model").chmod(0o555)
        with project.new_project(tmp_path / "new") as path:
            project.copy_in(path, {"models/model": tmp_path / "model"})
        (tmp_path / "new/models/model/more").touch()

    def test_folder_with_content_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").touch()
        with pytest.raises(BessemerError, match="exists and is not an empty folder"):
            project.check_target(tmp_path)


class TestCheckpoint:
    def test_checkpoint_is_described_from_its_files(self, tmp_path: Path) -> None:
        folder = write_foreign(tmp_path / "mine")
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
        found = read_checkpoint(folder)
        assert (found.kind, found.context, found.licence, found.chat_template) == ("causal", 96, "apache-2.0", True)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        assert found.parameters == sum(parameter.numel() for parameter in model.parameters())

    def test_unusable_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BessemerError, match=r"cannot be used as a model: it contains no config\.json"):
            read_checkpoint(tmp_path)

    def test_other_architecture_is_named(self, tmp_path: Path) -> None:
        folder = write_foreign(tmp_path / "mine")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["CLIPModel"]}), encoding="utf-8")
        with pytest.raises(BessemerError, match="CLIPModel without a head; expected a causal or a masked"):
            read_checkpoint(folder)

    def test_adapter_comes_with_its_base_model(self, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = write_foreign(tmp_path / "base")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
        adapted.save_pretrained(str(tmp_path / "adapter"))
        found = read_checkpoint(tmp_path / "adapter")
        assert found.kind == "causal"
        assert found.files == {"models/adapter": tmp_path / "adapter", "models/base": base}


class TestPipeline:
    @pytest.mark.parametrize(
        ("tables", "model", "stages"),
        [
            ([], checkpoint(), {"quantize@chat"}),
            ([], checkpoint("masked"), {"quantize@encoder"}),
            ([], checkpoint("classifier"), {"quantize@classifier"}),
            (["instructions"], checkpoint(), {"finetune@chat", "quantize@chat"}),
            (
                ["instructions", "rankings"], checkpoint(),
                {"finetune@chat", "reward@train", "reward@judge", "align@policy", "quantize@chat"},
            ),
            (["rankings"], checkpoint(), {"align@policy", "quantize@chat"}),
            (["corpus"], checkpoint(), {"pretrain@causal", "quantize@chat"}),
            (["corpus"], None, {"pretrain@causal", "quantize@chat"}),
            (["corpus", "instructions"], None, {"pretrain@causal", "finetune@chat", "quantize@chat"}),
            (["labels"], checkpoint("masked"), {"finetune@labels", "quantize@classifier"}),
            (["labels"], checkpoint(), {"finetune@labels", "quantize@classifier"}),
            (["corpus"], checkpoint("masked"), {"pretrain@masked", "quantize@encoder"}),
            (
                ["corpus", "labels"], checkpoint("masked"),
                {"pretrain@masked", "finetune@labels", "quantize@classifier"},
            ),
            (
                ["rankings", "labels"], checkpoint(),
                {"align@policy", "finetune@labels", "quantize@chat", "quantize@classifier"},
            ),
        ],
    )  # fmt: skip
    def test_only_the_stages_that_the_files_ask_for(
        self, tables: list[str], model: Checkpoint | None, stages: set[str]
    ) -> None:
        sections = design(Brought(model, {name: table() for name in tables}), MACHINE).sections
        made = ("pretrain", "finetune", "reward", "align", "prune", "quantize")
        assert {f"{stage}@{key}" for stage in made for key in sections.get(stage, {})} == stages

    def test_preferences_alone_are_learnt_by_dpo(self) -> None:
        entry = design(Brought(checkpoint(), {"rankings": table()}), MACHINE).sections["align"]["policy"]
        assert entry["algorithm"]["name"] == "dpo"
        assert entry["model"] == "models/mine"

    @pytest.mark.parametrize("table_name", ["instructions", "labels", "rankings"])
    def test_checkpoint_without_a_chat_template_gets_the_plain_one(self, table_name: str) -> None:
        brought = Brought(replace(checkpoint(), chat_template=False), {table_name: table()})
        sections = design(brought, MACHINE).sections
        [entry] = (sections.get("finetune") or sections["align"]).values()
        assert entry["chat_template"] == "plain"
        both = replace(brought, tables={"instructions": table(), "rankings": table()})
        assert "chat_template" not in design(both, MACHINE).sections["align"]["policy"]  # of the fine-tuned model

    def test_steps_fit_into_the_time_of_a_stage(self) -> None:
        slow = design(Brought(checkpoint(), {"instructions": table(rows=100_000)}), MACHINE)
        assert slow.seconds["finetune@chat"] <= STAGE_MINUTES * 60
        assert slow.notes[0].startswith("finetune@chat takes ")
        fast = design(Brought(checkpoint(), {"instructions": table(rows=100_000)}), FAST)
        assert fast.sections["finetune"]["chat"]["steps"] == 37_500
        assert not fast.notes

    def test_each_step_has_a_gate_where_the_data_can_judge_it(self) -> None:
        tables = {name: table(rows=400) for name in ("instructions", "rankings")}
        gates = design(Brought(checkpoint(), tables), MACHINE).sections["compare"]["gates"]
        assert [(gate["model"], gate["against"]) for gate in gates] == [
            ("tuned", "start"), ("policy", "tuned"), ("chat", "policy"),
        ]  # fmt: skip
        pairs = {"rankings": table(rows=400)}
        gates = design(Brought(checkpoint(), pairs), MACHINE).sections["compare"]["gates"]
        assert [(gate["metric"], gate["model"], gate.get("against"), gate["min"]) for gate in gates] == [
            ("implicit_reward_accuracy", "policy", None, 0.34), ("preference_accuracy", "policy", "start", -0.16),
            ("preference_accuracy", "chat", "policy", -0.16),
        ]  # fmt: skip
        for task, metric in (("classification", "accuracy"), ("regression", "mean_absolute_error")):
            labels = {"labels": replace(table(rows=400), task={"name": task})}
            [gate] = design(Brought(checkpoint(), labels), MACHINE).sections["compare"]["gates"]
            assert (gate["metric"], gate["model"], gate["against"]) == (metric, "classifier", "labels")
        few = {"instructions": table(rows=40), "rankings": table(rows=40)}
        assert design(Brought(checkpoint(), few), MACHINE).sections["compare"]["gates"] == []

    @pytest.mark.parametrize(
        ("name", "rows", "shares"),
        [
            ("corpus", 10_000, None), ("corpus", 300, {"prose": 0.04}), ("corpus", 10, {"prose": 0.25}),
            ("instructions", 100, None), ("instructions", 50, {"entities": 0.2}), ("rankings", 40, {"rankings": 0.25}),
        ],
    )  # fmt: skip
    def test_about_ten_rows_of_a_small_table_are_held_out(
        self, name: str, rows: int, shares: dict[str, float] | None
    ) -> None:
        ingest = design(Brought(checkpoint(), {name: table(rows=rows)}), MACHINE).sections["ingest"]
        assert ingest.get("heldout") == shares

    def test_conversations_and_labels_are_told_apart_by_their_sources(self) -> None:
        """Also if two files have the same name; what is aligned and evaluated follows."""
        named = {name: replace(table(), sources=({"kind": "files", "path": f"{name}/rows.csv"},))
                 for name in ("instructions", "labels", "rankings")}  # fmt: skip
        planned = design(
            Brought(checkpoint(), {name: named[name] for name in ("instructions", "rankings", "labels")}), MACHINE
        )
        sections = planned.sections
        assert [source["path"].partition("/")[0] for source in sections["ingest"]["sources"]] == [
            "instructions", "rankings", "labels",
        ]  # fmt: skip
        used = {key: entry["sources"] for key, entry in sections["finetune"].items()}
        assert used == {"chat": ["rows"], "labels": ["rows-3"]}
        assert sections["align"]["policy"]["sources"] == ["rows"]
        assert {key: entry["sources"] for key, entry in sections["evaluate"].items()} == {
            **{key: ["rows"] for key in ("start", "tuned", "policy", "chat")},
            **{key: ["rows-3"] for key in ("labels", "classifier")},
        }  # fmt: skip
        assert sections["finetune"]["labels"]["model"] == "models/mine"  # other conversations leave it as it is
        assert set(sections["package"]) == {"chat", "classifier"}
        assert len(params_text.render("everything", sections).splitlines()) <= params_text.MAX_LINES

    def test_small_models_are_trained_whole(self) -> None:
        small = design(Brought(checkpoint(parameters=5_000_000), {"instructions": table()}), MACHINE)
        assert "method" not in small.sections["finetune"]["chat"]

    @pytest.mark.parametrize(
        ("brought", "sentence"),
        [
            (Brought(), "Nothing to start from is named: add --checkpoint"),
            (Brought(tables={"instructions": table()}), "--conversations alone gives no model to start from"),
            (
                Brought(checkpoint("masked"), {"instructions": table()}),
                "mine is a masked model, which cannot answer conversations",
            ),
            (Brought(checkpoint("classifier"), {"labels": table()}), "mine is a classifier already"),
        ],
    )
    def test_what_makes_no_model_is_refused(self, brought: Brought, sentence: str) -> None:
        with pytest.raises(BessemerError, match=sentence):
            design(brought, MACHINE)


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "task"),
        [
            (["yes", "no"] * 20, {"name": "classification"}),
            ([1, 2, 3, 4, 5] * 8, {"name": "classification"}),  # stars
            ([f"topic {number % 30}" for number in range(90)], {"name": "classification", "max_labels": 60}),
            ([number / 7 for number in range(40)], {"name": "regression"}),
        ],
        ids=["words", "stars", "many", "numbers"],
    )
    def test_labels_decide_the_task(self, labels: list[Any], task: dict[str, Any], tmp_path: Path) -> None:
        rows = [{"text": f"Text {number}.", "label": label} for number, label in enumerate(labels)]
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        assert read_table("labels", [path], {}).task == task

    def test_answers_are_no_labels(self, tmp_path: Path) -> None:
        rows = [{"text": f"Text {number}.", "label": f"An answer to text {number}."} for number in range(40)]
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        with pytest.raises(BessemerError, match="found 40 different labels in 40 texts"):
            read_table("labels", [path], {})


class TestParamsText:
    def test_two_groups_of_similar_entries_have_anchors_of_their_own(self) -> None:
        chats = {key: {"model": key, "samples": 1, "questions": 1, "new": 2} for key in ("a", "b")}
        labels = {key: {"model": key, "sources": ["x"], "chat_template": "plain", "more": 1} for key in ("c", "d")}
        text = params_text.render("title", {"evaluate": {**chats, **labels}})
        assert YAML(typ="safe").load(text)["evaluate"] == {**chats, **labels}
        assert text.count("<<: *") == 2

    def test_text_reads_back_as_the_sections(self) -> None:
        sections: dict[str, Any] = {
            "base": {"seed": 1},
            "ingest": {"sources": [{"name": "a b", "columns": {"text": "{title}\n{body}"}, "group": None}] * 3},
            "finetune": {"chat": {"optimizer": {"learning_rate": 5.0e-5}, "model": "x" * 60, "note": "y, z: " * 20}},
        }
        text = params_text.render("title", sections)
        read = YAML(typ="safe").load(text)
        assert {name: read[name] for name in sections} == json.loads(json.dumps(sections))
        assert read["prune"] == {}
        assert all(len(line) <= 120 for line in text.splitlines() if "y, z" not in line)

    def test_longest_pipeline_fits_forty_lines(self) -> None:
        tables = {name: table() for name in ("corpus", "instructions", "rankings")}
        planned = design(Brought(checkpoint(), tables), MACHINE)
        assert len(params_text.render("everything", planned.sections).splitlines()) <= params_text.MAX_LINES


class TestCommand:
    @pytest.fixture
    def mine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder with a checkpoint, conversations and a LLaMA-Factory configuration."""
        monkeypatch.setattr(machine, "measure", lambda: MACHINE)
        write_foreign(tmp_path / "base", max_position_embeddings=256)
        rows = [{"question": f"Who is {name}?", "reply": f"A friend of {name}."} for name in ("Ann", "Bob", "Cid")]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        info = {"chats": {"file_name": "chats.jsonl", "columns": {"prompt": "question", "response": "reply"}}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        (tmp_path / "notes.md").write_text("# A note\n\nIt has no columns.\n", encoding="utf-8")
        (tmp_path / "alike.csv").write_text("text,label,class\nGood,a,up\nFine,b,up\n", encoding="utf-8")
        (tmp_path / "book.xlsx").write_bytes(b"PK\x03\x04" + bytes(60))
        config = {
            "model_name_or_path": "base", "stage": "sft", "finetuning_type": "lora", "dataset": "chats",
            "dataset_dir": ".", "cutoff_len": 64, "num_train_epochs": 4, "per_device_train_batch_size": 1,
            "resize_vocab": True, "output_dir": "saves",
        }  # fmt: skip
        YAML().dump(config, tmp_path / "lora.yaml")
        return tmp_path

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(cli.cli, ["init", *arguments])

    def test_configuration_of_another_tool_becomes_a_project(self, mine: Path) -> None:
        done = self.run(str(mine / "new"), "--from", str(mine / "lora.yaml"))
        assert done.exit_code == 0, done.output
        assert "not translated: resize_vocab: True" in done.output
        assert "without effect on the model: output_dir" in done.output
        settings = YAML(typ="safe").load(mine / "new/params.yaml")
        assert settings["finetune"]["chat"] | {"optimizer": {}} == {
            "model": "models/base", "method": {"name": "lora", "rank": 8, "alpha": 16}, "max_tokens": 64,
            "too_long": "truncate", "batch": 1, "steps": 12, "optimizer": {},
        }  # fmt: skip
        assert settings["package"] == {"chat": "data/quantize/chat/model"}

    def test_option_takes_several_paths(self, mine: Path) -> None:
        (mine / "more.jsonl").write_text((mine / "chats.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
        paths = [str(mine / "chats.jsonl"), str(mine / "more.jsonl")]
        done = self.run(str(mine / "new"), "--conversations", *paths, "--checkpoint", str(mine / "base"), "--yes")
        assert done.exit_code == 0, done.output
        sources = YAML(typ="safe").load(mine / "new/params.yaml")["ingest"]["sources"]
        assert [source["path"] for source in sources] == ["chats.jsonl", "more.jsonl"]

    def test_columns_are_named_by_option(self, mine: Path) -> None:
        rows = [{"topic": name, "good": f"Yes, {name}.", "bad": "No."} for name in ("tea", "rain", "snow")]
        (mine / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        columns = ["prompt=Do you like {topic}?", "chosen=good", "rejected=bad"]
        base = ["--checkpoint", str(mine / "base"), "--yes"]
        done = self.run(str(mine / "new"), "--preferences", str(mine / "pairs.jsonl"), "--columns", *columns, *base)
        assert done.exit_code == 0, done.output
        (source,) = YAML(typ="safe").load(mine / "new/params.yaml")["ingest"]["sources"]
        assert source["columns"] == {"prompt": "Do you like {topic}?", "chosen": "good", "rejected": "bad"}

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["--columns", "promt=topic", "--yes"],
                "--columns: found 'promt=topic', expected NAME=FIELD, for example text=body. NAME may be prompt",
            ),
            (["--conversations", "nowhere.jsonl", "--yes"], "--conversations: nowhere.jsonl does not exist"),
            (
                ["--conversations", "dataset_info.json", "--yes"],
                "has the columns chats; expected a question (question, prompt, instruction ...) and its answer "
                "(answer, response, output ...), or messages. Name them: --columns instruction=NAME output=NAME.",
            ),
            (["--preferences", "chats.jsonl", "--yes"], "contains conversations, not preferences: name it with --conv"),
            (["--conversations", "notes.md", "--yes"], "contains documents, not conversations: name it with --text"),
            (
                ["--labels", "alike.csv", "--columns", "label=class", "--checkpoint", "base", "--yes"],
                "all 2 texts have the label 'up'; expected two or more classes",
            ),
            (["--columns", "txt=topic", "--yes"], "for example text=body. NAME may be text."),
            (["--labels", "book.xlsx", "--checkpoint", "base", "--yes"], "a zip file or a document of Word, Excel"),
            (["--labels", "chats.jsonl", "--checkpoint", "base", "--yes"], "has the columns question, reply; expected"),
            (["--checkpoint", "."], "There is no terminal to ask in: add --yes"),
            (["--from", "lora.yaml", "--text", "x"], "--from names the data itself: leave out --text"),
        ],
    )
    def test_wrong_call_creates_nothing(
        self, arguments: list[str], sentence: str, mine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(mine)
        done = self.run("new", *arguments)
        assert done.exit_code != 0
        assert sentence in f"{done.output}{done.exception}"
        assert not (mine / "new").exists()

    def test_columns_of_a_spreadsheet_may_have_capitals(self, mine: Path) -> None:
        (mine / "faq.csv").write_text("Question,Answer\n" + "Who?,Me.\nWhere?,Here.\n" * 2, encoding="utf-8")
        (mine / "moods.csv").write_text("Text,Label\nGood,up\nBad,down\n", encoding="utf-8")
        base = ["--checkpoint", str(mine / "base"), "--yes"]
        done = self.run(str(mine / "new"), "--conversations", str(mine / "faq.csv"), *base)
        assert "instruction from `Question`, output from `Answer`" in done.output
        done = self.run(str(mine / "labelled"), "--labels", str(mine / "moods.csv"), *base)
        assert "text from `Text`, label from `Label`" in done.output
        assert "2 classes: up 1, down 1; 2 of them with one row" in done.output

    def test_questions_are_asked_in_a_terminal(self, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "_has_terminal", lambda: True)
        answers = f"{mine / 'base'}\n\nabsent.jsonl\n{mine / 'chats.jsonl'}\n\n\n"
        done = CliRunner().invoke(cli.cli, ["init", str(mine / "new")], input=answers)
        assert done.exit_code == 0, done.output
        assert "absent.jsonl does not exist; correct the path, and quote one that contains spaces." in done.output
        settings = YAML(typ="safe").load(mine / "new/params.yaml")
        assert list(settings["finetune"]) == ["chat"]
