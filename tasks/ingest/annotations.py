"""Exports of annotation tools: each annotator's answer to a record of Argilla or a task of Label Studio is a ranking.

Argilla: the output of `dataset.records.to_json` (version 2), and the flat rows of its data sets on the hub (versions 1
and 2); a RankingQuestion whose options are the names of the fields with the responses, or a LabelQuestion whose answer
is the name of the better one (https://docs.argilla.io/latest/how_to_guides/dataset, `argilla/records/_io` in
https://github.com/argilla-io/argilla). Label Studio: the export "JSON" of a project with `Pairwise` or with `List` and
`Ranker` (https://labelstud.io/tags/pairwise, https://labelstud.io/tags/ranker, https://labelstud.io/guide/task_format,
`tags/control` of the editor in https://github.com/HumanSignal/label-studio).

Neither export lists the texts that were compared, so they are recognized by their names.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice, zip_longest
from typing import Any

from tasks.ingest.turns import Row

PROMPT_FIELDS = ("prompt", "instruction", "question", "query", "input")
# response1, answer_2, reply-b, answerA, text_left: fields whose names differ only in this ending are compared.
NAME_PATTERN = re.compile(r"(.+?)(?:[ _-]?(\d+)|[ _-]([A-Za-z]|left|right)|(?<=[a-z])([A-Z]))")
ANSWER_KEYS = {"fields", "annotator", "answers", "status"}  # of one annotator's answer to a record of Argilla
UNSORTED_BUCKET = "_"  # Label Studio's bucket of items that were not moved into any other


def expand_answers(
    format_name: str, found: Iterable[tuple[str, Any]], prepare: Callable[[Any], Any]
) -> Iterator[tuple[str, Any]]:
    """Yield (position, row) for each annotator's answer; a row without any answer is yielded unchanged.

    `prepare` decodes a row; of a row for which it raises ValueError, the one who decodes it next reports the reason.
    """
    for position, row in found:
        record = None
        with suppress(ValueError):
            record = prepare(row)
        answers = ANSWER_SPLITTERS[format_name](record) if isinstance(record, Mapping) else []
        if not answers:
            yield position, row
        yield from ((f"{position}, answer {number}", answer) for number, answer in enumerate(answers, 1))


# Argilla


def _split_argilla_record(record: Row) -> list[Row]:
    """Return one row for each annotator of a record: the fields, the annotator, and the answers by question.

    Of unnamed annotators, the first answers to all questions are taken as one annotator's, the second as another's.
    """
    by_annotator: dict[tuple[str, int], dict[str, Any]] = {}
    unnamed: Counter[str] = Counter()  # number of unnamed answers by question
    for question, answer in _iter_argilla_responses(record):
        user = answer.get("user_id")
        unnamed[question] += user is None
        annotator = (str(user), 0 if user is not None else unnamed[question])
        row = by_annotator.setdefault(annotator, {"fields": _shown_fields(record), "annotator": user, "answers": {}})
        row["answers"][question] = answer.get("value")
        row["status"] = answer.get("status")
    return list(by_annotator.values())


def _shown_fields(record: Row) -> Row:
    """Return the fields of a record; of a flat row all texts, without the columns that the export adds."""
    if isinstance(record.get("fields"), Mapping):
        return {name: value for name, value in record["fields"].items() if value not in (None, [])}
    shown = {name: value for name, value in record.items() if name not in ("id", "_server_id", "status", "external_id")}
    return {name: value for name, value in shown.items() if "." not in name and isinstance(value, str)}


def _iter_argilla_responses(record: Row) -> Iterator[tuple[str, Row]]:
    """Yield (question, answer) from nested records or from flat ones (`question.responses`)."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        for question, answers in nested.items():
            yield from ((question, answer) for answer in _list_items(answers) if isinstance(answer, Mapping))
        return
    for column, values in record.items():
        if column.endswith(".responses") and isinstance(values, list):
            users, states = (_list_items(record.get(f"{column}.{name}")) for name in ("users", "status"))
            for value, user, status in islice(zip_longest(values, users, states), len(values)):
                yield column.removesuffix(".responses"), {"value": value, "user_id": user, "status": status}
        else:
            items = (item for item in _list_items(values) if isinstance(item, Mapping) and "user_id" in item)
            yield from ((column, item) for item in items)


def convert_argilla(answer: Row) -> Row:
    """Return one annotator's answer as a ranking; raise ValueError with the reason if that is not possible."""
    if set(answer) != ANSWER_KEYS:
        raise ValueError("no answer to this record; expected responses with value and user_id")
    if answer["status"] not in (None, "submitted"):
        raise ValueError(f"an answer with status {answer['status']}; expected submitted")
    fields, answers = answer["fields"], answer["answers"]
    ranked = {name: order for name, value in answers.items() if (order := _rank_options(value, fields))}
    if len(ranked) != 1:
        raise ValueError(
            f"expected one question whose options are the names of fields with responses, found {len(ranked)} "
            f"({', '.join(ranked) or 'none'}); questions: {', '.join(answers)}; fields: {', '.join(fields)}"
        )
    (order,) = ranked.values()
    absent = [str(option) for option, rank in order if not isinstance(fields.get(str(option)), str) or rank is None]
    if absent:
        raise ValueError(f"{', '.join(absent)} without a text or a rank; fields: {', '.join(fields)}")
    return {
        "prompt": _find_prompt(fields, [str(option) for option, _ in order]),
        "responses": [fields[str(option)] for option, _ in order],
        "ranks": [rank for _, rank in order],
        "annotator": answer["annotator"],
    }


def _rank_options(value: Any, fields: Row) -> list[tuple[Any, Any]]:
    """Return (option, rank) of an answer that ranks fields or chooses one; of any other answer an empty list."""
    if isinstance(value, str) and value in fields:
        others = [name for name in _sibling_names(value, fields) if name != value]
        return [(value, 1), *((name, 2) for name in others)] if others else []
    order = [
        (item.get("value"), item.get("rank", number)) if isinstance(item, Mapping) else (item, number)
        for number, item in enumerate(_list_items(value), 1)
    ]
    return order if any(isinstance(option, str) and option in fields for option, _ in order) else []


# Label Studio


def _split_label_studio_task(task: Row) -> list[Row]:
    """Return one task for each annotation of a task."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        return []
    return [{"data": task.get("data"), "annotations": [annotation]} for annotation in annotations]


def convert_label_studio(task: Row) -> Row:
    """Return a task with one annotation as a ranking; raise ValueError with the reason if that is not possible."""
    data, annotations = task.get("data"), task.get("annotations")
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        raise ValueError("data, annotations missing; expected a task of the export JSON (not JSON-MIN)")
    if not annotations or not isinstance(annotations[0], Mapping):
        raise ValueError("no annotation of this task")
    if annotations[0].get("was_cancelled"):
        raise ValueError("a skipped annotation")
    results = [item for item in _list_items(annotations[0].get("result")) if isinstance(item, Mapping)]
    judged = [item for item in results if item.get("type") in ("pairwise", "ranker")]
    if len(judged) != 1 or not isinstance(judged[0].get("value"), Mapping):
        kinds = ", ".join(str(item.get("type")) for item in results) or "none"
        raise ValueError(f"expected one result of the type pairwise or ranker, found {kinds}")
    ranking = (_convert_pairwise if judged[0]["type"] == "pairwise" else _convert_ranker)(data, judged[0])
    annotator = annotations[0].get("completed_by")
    if isinstance(annotator, Mapping):
        annotator = annotator.get("id") or annotator.get("email")
    return {**ranking, "annotator": annotator}


def _convert_pairwise(data: Row, result: Row) -> Row:
    """Return a pair as a ranking. The result contains `left` or `right`, and usually not the texts' names."""
    names = str(result.get("to_name")).split(",")
    if len(names) != 2 or not set(names) <= set(data):
        texts = [name for name, value in data.items() if isinstance(value, str)]
        groups = {tuple(_sibling_names(name, texts)) for name in texts}
        pairs = [group for group in groups if len(group) == 2]
        if len(pairs) != 1:
            raise ValueError(
                f"unknown which texts were compared: expected two whose names differ in their ending, such as "
                f"answer1 and answer2, found {', '.join(data)}"
            )
        names = list(pairs[0])
    selected = result["value"].get("selected")
    if selected not in ("left", "right"):
        raise ValueError(f"expected left or right to be selected, found {selected!r}")
    return {
        "prompt": _find_prompt(data, names),
        "responses": [data[name] for name in names],
        "ranks": [1, 2] if selected == "left" else [2, 1],
    }


def _convert_ranker(data: Row, result: Row) -> Row:
    """Return the items as a ranking in the annotator's order; buckets are rejected, because they have no order."""
    ranked = result["value"].get("ranker")
    if isinstance(ranked, Mapping):
        if len(ranked) != 1 or UNSORTED_BUCKET in ranked:
            raise ValueError(f"buckets ({', '.join(ranked)}) are not a ranking; expected a Ranker without Bucket")
        (ranked,) = ranked.values()
    if not isinstance(ranked, list):
        raise ValueError(f"expected ids in their order, found {ranked!r:.80}")
    for name, value in data.items():
        items = {str(item.get("id")): item for item in _list_items(value) if isinstance(item, Mapping)}
        if items and set(map(str, ranked)) <= set(items):
            texts = [_item_text(items[str(identifier)]) for identifier in ranked]
            return {"prompt": _find_prompt(data, [name]), "responses": texts, "ranks": list(range(1, len(texts) + 1))}
    raise ValueError(f"no list in data contains the ids {', '.join(map(str, ranked))}; data: {', '.join(data)}")


def _item_text(item: Row) -> Any:
    return item.get("body") or item.get("title") or item.get("body")


# Both tools


def _list_items(value: Any) -> list[Any]:
    """Return a list unchanged, a Parquet struct of lists as a list of objects, and an empty list for other values."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) else []


def _sibling_names(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that differ from this one in their ending only, including itself, sorted by the ending."""
    parts = NAME_PATTERN.fullmatch(name)
    if not parts:
        return [name]
    siblings = [(other, match) for other in names if (match := NAME_PATTERN.fullmatch(other)) and match[1] == parts[1]]
    endings = {other: next(filter(None, match.groups()[1:])) for other, match in siblings}
    return sorted(endings, key=lambda other: (len(endings[other]) if endings[other].isdigit() else 0, endings[other]))


def _find_prompt(fields: Row, compared: Sequence[str]) -> Any:
    """Return the prompt, a text or messages; a text is followed by the field `context` if there is one."""
    texts = {name: value for name, value in fields.items() if value and isinstance(value, str | list)}
    others = {name: value for name, value in texts.items() if name not in compared}
    field = next((name for name in PROMPT_FIELDS if others.get(name)), None)
    if field is None and len(others) != 1:
        found = ", ".join(others) or "nothing"
        raise ValueError(f"unknown which field is the prompt: found {found}; name the field {PROMPT_FIELDS[0]}")
    prompt = others[field] if field else next(iter(others.values()))
    context = others.get("context") if field else None
    return "\n".join((prompt, context)) if isinstance(context, str) and context and isinstance(prompt, str) else prompt


ANSWER_SPLITTERS: dict[str, Callable[[Row], list[Row]]] = {
    "argilla": _split_argilla_record,
    "label_studio": _split_label_studio_task,
}
