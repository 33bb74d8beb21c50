"""The run report's last section: what its figures do not say, as far as that follows from the data and the figures."""

from collections.abc import Sequence

from flows.results import Results
from tasks.common.evaluation.agreement import headline

Note = tuple[str, str]  # in a few words, and in full


def limits(run: Results) -> list[Note]:
    """Return the notes on the kinds of sources that the data came from, then those on the figures themselves."""
    notes: list[Note] = []
    used = {str(item["name"]): item for item in run.json("data/ingest/sources.json") or []}
    roles: dict[str, list[str]] = {}
    for source in run.settings("ingest").get("sources", []):
        name, role = str(source.get("name")), str(source.get("reader") or source.get("table") or source.get("kind"))
        if used.get(name, {}).get("used"):
            roles.setdefault(role, []).append(name)
    rated, facts = roles.get("ratings", []), _joined(roles, "countries", "elements", "facts")
    prose, people = _joined(roles, "speeches", "corpus"), roles.get("rankings", [])
    if rated:
        notes.append((
            "The ratings are about tone.",
            f"In {_and(rated)} people rated how pleasant a single sentence sounds, not whether it is true or of use. "
            "Sentences were grouped by chance, not as replies to one question. The reward model learns tone; PPO makes "
            "replies sound kinder. A higher mean reward does not mean better answers: exact match says what became of "
            "the facts.",
        ))  # fmt: skip
    if people:
        rows = sum(used[name]["rows"].get("rankings", 0) for name in people)
        notes.append(("People ranked some of it.", f"{rows:,} rankings in {_and(people)} compare replies directly."))
    elif empty := [str(item["name"]) for item in used.values() if item.get("kind") == "rankings"]:
        says = f"The source {_and(empty)} is still empty: no preference in the data compares two of its replies."
        notes.append(("Nobody has ranked this model’s own answers yet.", says))
    if facts:
        notes.append((
            "Held out means held out of the questions.",
            f"Statements about every entity of {_and(facts)} stand in the pretraining text. Exact match on held-out "
            "entities therefore says how well the model answers about what it has only read, and nothing about what it "
            "has never read. The facts are as right and as recent as these sources.",
        ))  # fmt: skip
    if prose:
        notes.append((
            "Perplexity is that of one kind of prose.",
            f"It is measured on held-out documents of {_and(prose)} and does not carry over to other English.",
        ))  # fmt: skip
    notes += _modest(run)
    return notes


def _modest(run: Results) -> list[Note]:
    """Return the limits that follow from the figures themselves."""
    notes = []
    gap = headline(run.metrics("reward@policy"))
    ours, peers = gap.get("model"), {"words": "bag_of_words", "words and their pairs": "bag_of_words_and_bigrams"}
    shares = {name: gap[key] for name, key in peers.items() if gap.get(key) is not None}
    if ours is not None and shares and ours <= max(shares.values()):
        name = max(shares, key=lambda name: shares[name])
        notes.append((
            f"A bag of {name} judges {'better' if ours < shares[name] else 'as well'}.",
            f"It orders {100 * shares[name]:.1f} % of the held-out pairs as people did, the reward model "
            f"{100 * ours:.1f} %: on these ratings, words alone tell the tone.",
        ))  # fmt: skip
    tokens = (run.metrics("tokenize").get("train") or {}).get("tokens")
    parameters = [model["parameters"] for model in run.sheet.get("models", []) if model.get("parameters")]
    if tokens and parameters and max(parameters) < 1e9:
        notes.append((
            "It is a small model.",
            f"{_millions(max(parameters))} parameters were trained on {_millions(tokens)} tokens of text. Asked about "
            "anything that is not in them, it makes an answer up.",
        ))  # fmt: skip
    return notes


def _joined(roles: dict[str, list[str]], *names: str) -> list[str]:
    return [source for name in names for source in roles.get(name, [])]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _millions(value: float) -> str:
    return f"{value / 1e6:.1f} million" if value >= 1e5 else f"{value:,}"
