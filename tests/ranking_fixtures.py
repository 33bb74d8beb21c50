"""A toy project that reads people's rankings, and people who make some."""

from serving.feedback import Store
from tests.conftest import Project

FILE = "data/sources/rankings/000001.parquet"
DVC = ("deps: [steps.py, data/source.txt]", "deps: [steps.py, data/source.txt, data/sources]")


def listen(project: Project, enough: int) -> None:
    """Give the toy project a folder of rankings that its first stage reads."""
    (project.path / "data/sources/rankings").mkdir(parents=True)
    (project.path / "data/sources/rankings/.gitkeep").touch()
    with (project.path / ".gitignore").open("a") as file:
        file.write("!/data/sources/\n")
    graph = project.path / "dvc.yaml"
    graph.write_text(graph.read_text().replace(*DVC))
    project.settings(placement={"enough_rankings": enough})
    with (project.path / "params.yaml").open("a") as file:
        file.write("ingest: {sources: [{name: people, kind: rankings, path: rankings}]}\n")
        file.write("validate: {text_characters: 99, message_characters: 99, refused_share: 0.1, heldout_questions: 0, ")
        file.write("rows: {corpus: 1, instructions: 1, rankings: 1}}\n")
    project.commit("rankings are read")


def rank(store: Store, number: int) -> None:
    """Have somebody rank two answers."""
    given = [(f"{text} {number}", "aaaa-1111", 0.7, None) for text in ("Lima.", "It is Lima.")]
    answers = store.add_answers([{"role": "user", "content": "What is the capital of Peru?"}], given)
    store.add_ranking(f"ranking-{number}", answers, (1, 2), "annotator-ann")
