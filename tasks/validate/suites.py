"""The Great Expectations suites, one for each table, and the reading of their results.

Great Expectations takes seconds to import, so this module refers to its classes by name and imports it only in `run`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.validate.checks import REQUIRED_COLUMNS, SPLITS, TURNS_PATTERN, Features, Limits, count_splits

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MAX_EXAMPLES = 3
# Features that the suites read; the others are used by the row checks only.
COMMON_COLUMNS = ("id", "text", "characters", "damaged", "source", "split", "content_key")
CHAT_COLUMNS = (*COMMON_COLUMNS, "turns", "shortest", "longest")
TEXT_CHARACTERS = 1  # of each text kept in a frame: enough to check that it is not null
CATEGORICAL_COLUMNS = ("text", "source", "licence")  # few distinct values, stored as dictionaries
COLUMNS = {
    "corpus": (*COMMON_COLUMNS, "licence", "absent_names"),
    "instructions": (*CHAT_COLUMNS, "entity", "answer_given", "heldout_question", "split_keys"),
    "rankings": (*CHAT_COLUMNS, "responses", "repeated", "fit", "best_empty", "split_keys"),
}


@dataclass(frozen=True)
class Expectation:
    """An expectation: its description for readers, and its class and arguments in Great Expectations.

    `setting`: the limit under `validate` that decides it, if there is one. `shows_rejected`: a failure is explained
    with rejected rows instead of kept ones.
    """

    description: str
    type: str
    arguments: Mapping[str, Any]
    setting: str | None
    shows_rejected: bool


@dataclass(frozen=True)
class Verdict:
    """The result of an expectation. `rows` are positions in the clean table of some rows that do not meet it."""

    suite: str
    description: str
    type: str
    success: bool
    observed: str
    unexpected: int
    rows: tuple[int, ...]
    setting: str | None
    shows_rejected: bool


def _expect(
    description: str, kind: str, *, setting: str | None = None, shows_rejected: bool = False, **arguments: Any
) -> Expectation:
    return Expectation(description, kind, arguments, setting, shows_rejected)


def suite(table: str, limits: Limits) -> list[Expectation]:
    """Return the expectations of a table; a limit that is not set, or is 0, makes none."""
    rows, share = getattr(limits.min_rows, table), limits.max_rejected_share
    least_rows = _expect(
        f"there are at least {rows:,} rows", "ExpectTableRowCountToBeBetween", setting=f"min_rows.{table}",
        shows_rejected=True, min_value=rows,
    )  # fmt: skip
    common = [
        *([least_rows] if rows else []),
        _expect(f"at most {share:.0%} of the rows were invalid", "ExpectColumnMaxToBeBetween",
                setting="max_rejected_share", shows_rejected=True, column="invalid_share", max_value=share),
        *(
            _expect(f"{column} is never null", "ExpectColumnValuesToNotBeNull", column=column)
            for column in REQUIRED_COLUMNS[table]
        ),
        _expect("every id is unique", "ExpectColumnValuesToBeUnique", column="id"),
        _expect("no content is duplicated", "ExpectColumnValuesToBeUnique", column="content_key"),
        _expect("the split is train or heldout", "ExpectColumnValuesToBeInSet", column="split", value_set=list(SPLITS)),
        _expect("no text has damaged encoding", "ExpectColumnValuesToBeInSet", column="damaged", value_set=[False]),
    ]  # fmt: skip
    return common + {"corpus": _corpus, "instructions": _instructions, "rankings": _rankings}[table](limits)


def _longest(description: str, column: str, limits: Limits, setting: str) -> list[Expectation]:
    """Return the expectation on the longest text, if a limit is set."""
    limit = getattr(limits, setting)
    text = f"{description} {limit or 0:,} characters"
    return (
        []
        if limit is None
        else [_expect(text, "ExpectColumnValuesToBeBetween", setting=setting, column=column, max_value=limit)]
    )


def _corpus(limits: Limits) -> list[Expectation]:
    return [
        _expect("no document is empty", "ExpectColumnValuesToBeBetween", column="characters", min_value=1),
        *_longest("no document is longer than", "characters", limits, "max_text_characters"),
        _expect("every name occurs in its text", "ExpectColumnValuesToBeBetween", column="absent_names", max_value=0),
        # Conversations and rankings may be there for the evaluation alone; held-out documents alone serve nothing.
        _expect(
            "some rows are for training", "ExpectColumnDistinctValuesToContainSet", column="split", value_set=["train"]
        ),
    ]


def _turns(limits: Limits, item: str) -> list[Expectation]:
    return [
        _expect("turns are in order: system (if any), then user and assistant in turn",
                "ExpectColumnValuesToMatchRegex", column="turns", regex=TURNS_PATTERN),
        _expect("no message is empty", "ExpectColumnValuesToBeBetween", column="shortest", min_value=1),
        *_longest(f"no {item} is longer than", "longest", limits, "max_message_characters"),
    ]  # fmt: skip


def _instructions(limits: Limits) -> list[Expectation]:
    questions = limits.min_heldout_questions
    least_questions = _expect(
        f"there are at least {questions:,} different questions about held-out entities",
        "ExpectColumnUniqueValueCountToBeBetween", setting="min_heldout_questions", column="heldout_question",
        min_value=questions,
    )  # fmt: skip
    return [
        *_turns(limits, "message"),
        _expect("every reply contains its answer", "ExpectColumnValuesToBeInSet",
                column="answer_given", value_set=[True]),
        _expect("no entity has questions in both splits", "ExpectColumnValuesToBeBetween",
                column="splits", max_value=1),
        *([least_questions] if questions else []),
    ]  # fmt: skip


def _rankings(limits: Limits) -> list[Expectation]:
    return [
        *_turns(limits, "message or response"),
        _expect("no empty response is ranked best", "ExpectColumnValuesToBeInSet",
                column="best_empty", value_set=[False]),
        _expect("there are two or more responses", "ExpectColumnValuesToBeBetween", column="responses", min_value=2),
        _expect("all responses are distinct", "ExpectColumnValuesToBeBetween", column="repeated", max_value=0),
        _expect("ranks or scores fit the responses and the scale", "ExpectColumnValuesToBeInSet",
                column="fit", value_set=["fits"]),
        _expect("no prompt with its response is in both splits", "ExpectColumnValuesToBeBetween",
                column="splits", max_value=1),
    ]  # fmt: skip


def make_suite_table(table: str, found: Sequence[Features]) -> "pa.Table":
    """Return the columns that a suite reads: some dozen bytes a row, with the first character of its text only."""
    import pyarrow as pa

    content = {column: [features[column] for features in found] for column in COLUMNS[table]}
    content["text"] = [text[:TEXT_CHARACTERS] for text in content["text"]]
    return pa.table(content, schema(table))


def schema(table: str) -> "pa.Schema":
    """Return the schema of the columns that a suite reads."""
    import pyarrow as pa

    kinds = {
        "split_keys": pa.list_(pa.binary(16)),
        **dict.fromkeys(("damaged", "answer_given", "best_empty"), pa.bool_()),
    }
    kinds |= dict.fromkeys(CATEGORICAL_COLUMNS, pa.dictionary(pa.int32(), pa.string()))
    kinds |= dict.fromkeys(("characters", "absent_names", "shortest", "longest", "responses", "repeated"), pa.int32())
    return pa.schema([(column, kinds.get(column, pa.string())) for column in COLUMNS[table]])


def make_kept_frame(suite_tables: "Sequence[pa.Table]", kept: Sequence[bool]) -> "pd.DataFrame":
    """Return one frame of the kept rows; a column `splits` counts the splits of their keys, where they have any."""
    import pyarrow as pa

    content = pa.concat_tables(suite_tables).filter(pa.array(kept, pa.bool_())).unify_dictionaries()
    has_keys = "split_keys" in content.column_names
    frame: pd.DataFrame = (content.drop_columns(["split_keys"]) if has_keys else content).to_pandas()
    if has_keys:
        frame["splits"] = count_splits(content["split_keys"].to_pylist(), content["split"].to_pylist())
    return frame


def run(table: str, frame: "pd.DataFrame", invalid_share: float, limits: Limits) -> list[Verdict]:
    """Validate the frame of a clean table against its suite and return one verdict for each expectation.

    Raise RuntimeError if an expectation cannot be computed.
    """
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # the library reads it on import; it must send nothing
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    frame["invalid_share"] = invalid_share
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset(table)
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": frame})
    expected = suite(table, limits)
    # Results are not in the order of the expectations; the number in `meta` matches them.
    built = [
        getattr(gx.expectations, item.type)(**item.arguments, meta={"number": number})
        for number, item in enumerate(expected)
    ]
    result = batch.validate(gx.ExpectationSuite(name=table, expectations=built), result_format="COMPLETE")
    results = {_expectation_number(item): item for item in result.results}
    return [_verdict(table, expectation, results[number]) for number, expectation in enumerate(expected)]


def _expectation_number(item: Any) -> int:
    return int(item.expectation_config.meta["number"])


def _verdict(table: str, expectation: Expectation, item: Any) -> Verdict:
    # `exception_info` is one dictionary for one exception, and a dictionary by metric for several.
    infos = [item.exception_info, *(info for info in item.exception_info.values() if isinstance(info, dict))]
    if any(info.get("raised_exception") for info in infos):
        raise RuntimeError(f"suite {table}: {expectation.description!r} could not be computed: {item.exception_info}")
    found = item.result
    unexpected = int(found.get("unexpected_count") or 0)
    observed = (
        f"{unexpected:,} of {found['element_count']:,} rows" if "element_count" in found else _format_observed(found)
    )
    rows = tuple(int(row) for row in (found.get("unexpected_index_list") or [])[:MAX_EXAMPLES])
    return Verdict(
        suite=table,
        description=expectation.description,
        type=expectation.type,
        success=bool(item.success),
        observed=observed,
        unexpected=unexpected,
        rows=rows,
        setting=expectation.setting,
        shows_rejected=expectation.shows_rejected,
    )


def _format_observed(found: Mapping[str, Any]) -> str:
    """Return the observed value of an expectation on a whole column; fractions are shares."""
    value = found.get("observed_value")
    if value is None:
        missing = ", ".join(map(str, found.get("partial_missing_list") or ()))
        return f"none with {missing}" if missing else ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
