"""A toy project with a source of rankings, and a helper that adds rankings."""

from serving.feedback.store import Store
from tests.conftest import Project

FILE = "data/sources/rankings/000001.parquet"
DVC = ("deps: [steps.py, data/source.txt]", "deps: [steps.py, data/source.txt, data/sources]")


def add_rankings_source(project: Project, min_new_rankings: int) -> None:
    """Add a folder of rankings to the toy project, as a dependency of its first stage."""
    (project.path / "data/sources/rankings").mkdir(parents=True)
    (project.path / "data/sources/rankings/.gitkeep").touch()
    with (project.path / ".gitignore").open("a") as file:
        file.write("!/data/sources/\n")
    graph = project.path / "dvc.yaml"
    graph.write_text(graph.read_text().replace(*DVC))
    project.settings(placement={"min_new_rankings": min_new_rankings})
    with (project.path / "params.yaml").open("a") as file:
        file.write("ingest: {sources: [{name: people, kind: rankings, path: rankings}]}\n")
        file.write("validate: {max_text_characters: 99, max_message_characters: 99, max_rejected_share: 0.1, ")
        file.write("min_heldout_questions: 0, ")
        file.write("min_rows: {corpus: 1, instructions: 1, rankings: 1}}\n")
    project.commit("add a source of rankings")


def rank(store: Store, number: int) -> None:
    """Add a ranking of two answers."""
    texts = [(f"{text} {number}", "aaaa-1111", 0.7, None) for text in ("Lima.", "It is Lima.")]
    answers = store.add_answers([{"role": "user", "content": "What is the capital of Peru?"}], texts)
    store.add_ranking(f"ranking-{number}", answers, (1, 2), "annotator-ann")
