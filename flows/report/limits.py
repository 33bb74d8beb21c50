"""The section "Limits" of the run report: what its figures do not show, derived from the data and the figures."""

from collections.abc import Sequence

from flows.results import Results
from tasks.common.reward.agreement import headline
from tasks.ingest.source_settings import READER_TABLES

Note = tuple[str, str]  # heading and text


def limits(run: Results) -> list[Note]:
    """Return the notes on the kinds of data sources, then those on the figures."""
    notes: list[Note] = []
    used = {str(item["name"]): item for item in run.json("data/ingest/sources.json") or []}
    roles: dict[str, list[str]] = {}
    for source in run.settings("ingest").get("sources", []):
        name = str(source.get("name"))
        rows = used.get(name, {}).get("rows", {})
        largest = max(rows, key=lambda table: rows[table]) if any(rows.values()) else None
        main_table = next(iter(READER_TABLES.get(str(source.get("reader")), ())), source.get("table"))
        role = str(main_table or largest or source.get("kind"))
        if used.get(name, {}).get("used"):
            roles.setdefault(role, []).append(name)
    rating_sources, fact_sources = roles.get("ratings", []), roles.get("facts", [])
    prose_sources, ranking_sources = roles.get("corpus", []), roles.get("rankings", [])
    if rating_sources:
        notes.append((
            "The ratings are of single sentences.",
            f"In {_and(rating_sources)} people rated sentences by themselves, not as replies to a question. Sentences "
            "were grouped at random. The reward model learns what these people rated, so a higher mean reward does not "
            "mean more correct answers: the other figures show what alignment cost.",
        ))  # fmt: skip
    if ranking_sources:
        rows = sum(used[name]["rows"].get("rankings", 0) for name in ranking_sources)
        notes.append(
            (
                "Some of the data is ranked by people.",
                f"{rows:,} rankings in {_and(ranking_sources)} compare replies directly.",
            )
        )
    elif empty := [str(item["name"]) for item in used.values() if item.get("kind") == "rankings"]:
        text = f"The source {_and(empty)} is still empty: no preference in the data compares replies of this model."
        notes.append(("This model’s own answers are not ranked yet.", text))
    if fact_sources:
        notes.append((
            "Held out means held out of the questions.",
            f"The pretraining text has statements about every entity of {_and(fact_sources)}. Exact match on held-out "
            "entities therefore measures answers about entities seen in pretraining only, not about unknown ones. The "
            "facts are as correct and as recent as these sources.",
        ))  # fmt: skip
    if prose_sources:
        notes.append((
            "Perplexity is measured on one kind of text.",
            f"It is measured on held-out documents of {_and(prose_sources)} and does not carry over to other text.",
        ))  # fmt: skip
    notes += _figure_limits(run)
    return notes


def _figure_limits(run: Results) -> list[Note]:
    """Return the notes that follow from the figures."""
    notes = []
    trained = [name for name in run.entries("reward") if run.settings(name).get("role") == "train"]
    gap = headline(run.metrics(trained[0])) if trained else {}
    model_accuracy, baselines = (
        gap.get("model"),
        {"words": "bag_of_words", "words and their pairs": "bag_of_words_and_bigrams"},
    )
    baseline_accuracies = {name: gap[key] for name, key in baselines.items() if gap.get(key) is not None}
    if model_accuracy is not None and baseline_accuracies and model_accuracy <= max(baseline_accuracies.values()):
        name = max(baseline_accuracies, key=lambda name: baseline_accuracies[name])
        notes.append((
            f"A bag of {name} is {'more accurate' if model_accuracy < baseline_accuracies[name] else 'as accurate'}.",
            f"It orders {100 * baseline_accuracies[name]:.1f} % of the held-out pairs like people, the reward model "
            f"{100 * model_accuracy:.1f} %: for these ratings, words alone determine the rating.",
        ))  # fmt: skip
    tokens = (run.metrics("tokenize").get("train") or {}).get("tokens")
    parameters = [model["parameters"] for model in run.scorecard.get("models", []) if model.get("parameters")]
    if tokens and parameters and max(parameters) < 1e9:
        notes.append((
            "It is a small model.",
            f"{_millions(max(parameters))} parameters were trained on {_millions(tokens)} tokens of text. Asked about "
            "anything else, it makes up an answer.",
        ))  # fmt: skip
    return notes


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f} million" if value >= 1e5 else f"{value:,}"
