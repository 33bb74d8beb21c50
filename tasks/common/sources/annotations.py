"""Exports of annotation tools: each person's answer to a record of Argilla or a task of Label Studio is a ranking.

Argilla: what `dataset.records.to_json` (version 2) writes, and the flat rows of its data sets on the hub (versions 1
and 2); a RankingQuestion whose options are called like the fields that hold the responses, or a LabelQuestion that
names the better one (https://docs.argilla.io/latest/how_to_guides/dataset, `argilla/records/_io` in
https://github.com/argilla-io/argilla). Label Studio: the export "JSON" of a project with `Pairwise` or with `List` and
`Ranker` (https://labelstud.io/tags/pairwise, https://labelstud.io/tags/ranker, https://labelstud.io/guide/task_format,
`tags/control` of the editor in https://github.com/HumanSignal/label-studio).

Neither export says all that was on the screen: which texts were compared is known by their names.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

from tasks.common.sources.turns import Row

PROMPTS = ("prompt", "instruction", "question", "query", "input")
# response1, answer_2, reply-b, answerA, text_left: names that differ in such an ending stand for what is compared.
ENDING = re.compile(r"(.+?)(?:[ _-]?(\d+)|[ _-]([A-Za-z]|left|right)|(?<=[a-z])([A-Z]))")
ANSWER = {"fields", "annotator", "answers", "status"}  # one person's, to a record of Argilla
UNTOUCHED = "_"  # where Label Studio keeps what nobody moved into a bucket


def spread(form: str, found: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield a row for each person's answer, its place told; a row without any, or of another kind, as it is."""
    for place, row in found:
        record = _decoded(row)
        answers = ANSWERS[form](record) if isinstance(record, Mapping) else []
        if not answers:
            yield place, row
        yield from ((f"{place}, answer {number}", answer) for number, answer in enumerate(answers, 1))


def _decoded(row: Any) -> Any:
    try:
        return json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError):  # told where the row is taken
        return row


# Argilla


def _argilla_answers(record: Row) -> list[Row]:
    """Return a record once for each person who answered: its fields, the person, and the answers by question.

    Of people without names the first answer to each question is taken for one person's, the second for another's.
    """
    people: dict[tuple[str, int], dict[str, Any]] = {}
    unnamed: Counter[str] = Counter()  # answers to a question
    for question, answer in _argilla_told(record):
        user = answer.get("user_id")
        unnamed[question] += user is None
        person = (str(user), 0 if user is not None else unnamed[question])
        one = people.setdefault(person, {"fields": _fields(record), "annotator": user, "answers": {}})
        one["answers"][question] = answer.get("value")
        one["status"] = answer.get("status")
    return list(people.values())


def _fields(record: Row) -> Row:
    """Return what was shown: of a flat row all that is text or a chat, the export's own columns left out."""
    if isinstance(record.get("fields"), Mapping):
        return {name: value for name, value in record["fields"].items() if value not in (None, "", [])}
    shown = {name: value for name, value in record.items() if name not in ("id", "_server_id", "status", "external_id")}
    return {name: value for name, value in shown.items() if "." not in name and isinstance(value, str) and value}


def _argilla_told(record: Row) -> Iterator[tuple[str, Row]]:
    """Yield each answer with its question, from nested records or from flat ones (`question.responses`)."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        for question, answers in nested.items():
            yield from ((question, answer) for answer in _items(answers) if isinstance(answer, Mapping))
        return
    for column, values in record.items():
        if column.endswith(".responses") and isinstance(values, list):
            users, states = (_items(record.get(f"{column}.{name}")) for name in ("users", "status"))
            for value, user, status in islice(zip_longest(values, users, states), len(values)):
                yield column.removesuffix(".responses"), {"value": value, "user_id": user, "status": status}
        else:
            yield from ((column, item) for item in _items(values) if isinstance(item, Mapping) and "user_id" in item)


def argilla(answer: Row) -> Row:
    """Return one person's answer as a ranking; raise ValueError with the reason where it is none."""
    if set(answer) != ANSWER:
        raise ValueError("nobody has answered this record; expected responses with value and user_id")
    if answer["status"] not in (None, "submitted"):
        raise ValueError(f"an answer that is {answer['status']}, not submitted")
    fields, answers = answer["fields"], answer["answers"]
    ranked = {name: order for name, value in answers.items() if (order := _order(value, fields))}
    if len(ranked) != 1:
        raise ValueError(
            f"expected one question whose options are called like fields with responses, found {len(ranked)} "
            f"({', '.join(ranked) or 'none'}); questions: {', '.join(answers)}; fields: {', '.join(fields)}"
        )
    (order,) = ranked.values()
    absent = [str(option) for option, rank in order if not isinstance(fields.get(str(option)), str) or rank is None]
    if absent:
        raise ValueError(f"{', '.join(absent)} without a text or a rank; fields: {', '.join(fields)}")
    return {
        "prompt": _prompt(fields, [str(option) for option, _ in order]),
        "responses": [fields[str(option)] for option, _ in order],
        "ranks": [rank for _, rank in order],
        "annotator": answer["annotator"],
    }


def _order(value: Any, fields: Row) -> list[tuple[Any, Any]]:
    """Return (option, rank) of an answer that ranks or chooses among fields; of any other none."""
    if isinstance(value, str) and value in fields:
        others = [name for name in _compared(value, fields) if name != value]
        return [(value, 1), *((name, 2) for name in others)] if others else []
    order = [
        (item.get("value"), item.get("rank", number)) if isinstance(item, Mapping) else (item, number)
        for number, item in enumerate(_items(value), 1)
    ]
    return order if any(isinstance(option, str) and option in fields for option, _ in order) else []


# Label Studio


def _label_studio_answers(task: Row) -> list[Row]:
    """Return a task once for each of its annotations."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        return []
    return [{"data": task.get("data"), "annotations": [annotation]} for annotation in annotations]


def label_studio(task: Row) -> Row:
    """Return a task with one annotation as a ranking; raise ValueError with the reason where it is none."""
    data, annotations = task.get("data"), task.get("annotations")
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        raise ValueError("data, annotations missing; expected a task of the export JSON (not JSON-MIN)")
    if not annotations or not isinstance(annotations[0], Mapping):
        raise ValueError("nobody has annotated this task")
    if annotations[0].get("was_cancelled"):
        raise ValueError("an annotation that was skipped")
    results = [item for item in _items(annotations[0].get("result")) if isinstance(item, Mapping)]
    judged = [item for item in results if item.get("type") in ("pairwise", "ranker")]
    if len(judged) != 1 or not isinstance(judged[0].get("value"), Mapping):
        kinds = ", ".join(str(item.get("type")) for item in results) or "none"
        raise ValueError(f"expected one result of the type pairwise or ranker, found {kinds}")
    ranking = (_pairwise if judged[0]["type"] == "pairwise" else _ranker)(data, judged[0])
    person = annotations[0].get("completed_by")
    if isinstance(person, Mapping):
        person = person.get("id") or person.get("email")
    return {**ranking, "annotator": person}


def _pairwise(data: Row, result: Row) -> Row:
    """Return a pair; a result that was chosen holds `left` or `right` and, as a rule, not what stood there."""
    names = str(result.get("to_name")).split(",")
    if len(names) != 2 or not set(names) <= set(data):
        texts = [name for name, value in data.items() if isinstance(value, str)]
        groups = {tuple(_compared(name, texts)) for name in texts}
        pairs = [group for group in groups if len(group) == 2]
        if len(pairs) != 1:
            raise ValueError(
                f"cannot tell which texts were compared: expected two whose names differ in their ending, such as "
                f"answer1 and answer2, found {', '.join(data)}"
            )
        names = list(pairs[0])
    selected = result["value"].get("selected")
    if selected not in ("left", "right"):
        raise ValueError(f"expected left or right to be selected, found {selected!r}")
    return {
        "prompt": _prompt(data, names),
        "responses": [data[name] for name in names],
        "ranks": [1, 2] if selected == "left" else [2, 1],
    }


def _ranker(data: Row, result: Row) -> Row:
    """Return the list in the order into which it was brought; buckets say nothing of which is the better one."""
    ranked = result["value"].get("ranker")
    if isinstance(ranked, Mapping):
        if len(ranked) != 1 or UNTOUCHED in ranked:
            raise ValueError(f"buckets ({', '.join(ranked)}) are no ranking; expected a Ranker without Bucket")
        (ranked,) = ranked.values()
    if not isinstance(ranked, list):
        raise ValueError(f"expected ids in their order, found {ranked!r:.80}")
    for name, value in data.items():
        items = {str(item.get("id")): item for item in _items(value) if isinstance(item, Mapping)}
        if items and set(map(str, ranked)) <= set(items):
            texts = [items[str(identifier)].get("body") or items[str(identifier)].get("title") for identifier in ranked]
            return {"prompt": _prompt(data, [name]), "responses": texts, "ranks": list(range(1, len(texts) + 1))}
    raise ValueError(f"no list in data holds the ids {', '.join(map(str, ranked))}; data: {', '.join(data)}")


# What both have


def _items(value: Any) -> list[Any]:
    """Return a list as it is, and one of objects also where Parquet holds it as a list a column; of the rest none."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else []


def _compared(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that differ from this one in their ending, itself included, in their order."""
    found = ENDING.fullmatch(name)
    if not found:
        return [name]
    alike = [(other, match) for other in names if (match := ENDING.fullmatch(other)) and match[1] == found[1]]
    endings = {other: next(filter(None, match.groups()[1:])) for other, match in alike}
    return sorted(endings, key=lambda other: (len(endings[other]) if endings[other].isdigit() else 0, endings[other]))


def _prompt(shown: Row, compared: Sequence[str]) -> Any:
    """Return what was asked: a text or messages, below it the context where there is one."""
    others = {name: value for name, value in shown.items() if name not in compared and isinstance(value, str | list)}
    named = next((name for name in PROMPTS if others.get(name)), None)
    if named is None and len(others) != 1:
        raise ValueError(f"cannot tell the prompt among {', '.join(others) or 'nothing'}; call it {PROMPTS[0]}")
    prompt = others[named] if named else next(iter(others.values()))
    context = others.get("context") if named else None
    return "\n".join((prompt, context)) if isinstance(context, str) and context and isinstance(prompt, str) else prompt


ANSWERS: dict[str, Callable[[Row], list[Row]]] = {"argilla": _argilla_answers, "label_studio": _label_studio_answers}
