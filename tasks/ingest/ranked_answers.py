"""Public data sets of preferences that are not pairs of a chosen and a rejected reply; each row becomes a ranking.

Two forms: a prompt with a list of answers that each have a rank or a score (Nectar, UltraFeedback), and two answers
with the name of the better one (LMSYS Arena, PKU-SafeRLHF). Scores become ranks, equal ones a tie.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.ingest import preferences
from tasks.ingest.turns import Reasoning, Row, require_text

LISTS = ("answers", "completions", "responses")  # names of a column with a list of answers
TEXTS = ("answer", "response", "completion", "text", "content", "output")  # an answer's text in its object
SCORES = ("overall_score", "score", "rating")
RANK = "rank"
TWO_ANSWERS = (  # names of two columns with an answer or a whole conversation each, and of the one with the better
    ("answer_a", "answer_b", "winner"), ("conversation_a", "conversation_b", "winner"),
    ("response_a", "response_b", "winner"), ("response_0", "response_1", "better_response_id"),
)  # fmt: skip
WINNERS = {  # names of the better answer
    **dict.fromkeys(("a", "model_a", "answer_a", "response_a", "0"), "answer_a"),
    **dict.fromkeys(("b", "model_b", "answer_b", "response_b", "1"), "answer_b"),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), "tie"),
}
COLUMNS = ("prompt", "answers", "answer_a", "answer_b", "winner", "system")


def renamed_columns(row: Row, questions: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Yield the columns of a row in one of the two forms: this module's name -> the row's name."""
    prompt = next((name for name in questions if name in row), None)
    named = {"prompt": prompt} if prompt else {}
    for name in LISTS:
        value = row.get(name)
        if prompt and isinstance(value, list) and value and _is_ranked(value[0]):
            yield {**named, "answers": name}
    for first, second, winner in TWO_ANSWERS:
        if {first, second, winner} <= row.keys():
            yield {**named, "answer_a": first, "answer_b": second, "winner": winner}


def convert(row: Row, reasoning: Reasoning = "reject") -> Row:
    """Return a row as a ranking; raise ValueError with the reason if it is not one."""
    if row.get("answers") is None and row.get("winner") is not None:
        return _convert_two(row, reasoning)
    answers = row.get("answers")
    if row.get("prompt") is None or not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("expected a prompt and two or more answers with a rank or a score each")
    texts = [_text_of(answer, number) for number, answer in enumerate(answers, 1)]
    places = [_place_of(answer, number) for number, answer in enumerate(answers, 1)]
    order = sorted(set(places))
    prompt = preferences.add_system(preferences.parse_prompt(row["prompt"], reasoning), row.get("system"))
    models = [answer.get("model") for answer in answers]
    named = all(isinstance(model, str) for model in models)
    ranks = [order.index(place) + 1 for place in places]
    return {"prompt": prompt, "responses": texts, "ranks": ranks, "models": models if named else None}


def _convert_two(row: Row, reasoning: Reasoning) -> Row:
    winner = WINNERS.get(str(row["winner"]).strip().lower())
    if winner is None:
        raise ValueError(f"winner must be one of {', '.join(WINNERS)}; found {row['winner']!r:.80}")
    better, other = ("answer_b", "answer_a") if winner == "answer_b" else ("answer_a", "answer_b")
    pair = {name: row.get(name) for name in ("prompt", "system")}
    ranking = preferences.convert({**pair, "chosen": row.get(better), "rejected": row.get(other)}, reasoning)
    return {**ranking, "ranks": [1, 1]} if winner == "tie" else ranking


def _is_ranked(answer: Any) -> bool:
    return (
        isinstance(answer, Mapping)
        and any(name in answer for name in TEXTS)
        and any(name in answer for name in (RANK, *SCORES))
    )


def _text_of(answer: Any, number: int) -> str:
    found = next((answer[name] for name in TEXTS if name in answer), None) if isinstance(answer, Mapping) else None
    return require_text(found, f"text of answer {number}")


def _place_of(answer: Mapping[str, Any], number: int) -> float:
    """Return a number that is lower for a better answer: its rank, or its negative score."""
    rank = answer.get(RANK)
    score = next((answer[name] for name in SCORES if answer.get(name) is not None), None)
    found = rank if rank is not None else score
    if isinstance(found, bool) or not isinstance(found, int | float) or found != found:
        raise ValueError(f"answer {number} has neither a rank nor a score that is a number, found {found!r:.80}")
    return float(found) if rank is not None else -float(found)
