"""The Great Expectations suites, one a table, and how their results are read.

Great Expectations takes seconds to import: this module names its classes and imports it only where a suite is run.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.common.validation.checks import FILLED, SPLITS, TURNS, Features, Limits, sides

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

EXAMPLES = 3
# Columns of the features that the suites look at; the others only serve the row checks.
EVERY = ("id", "text", "characters", "damaged", "source", "split", "same")
CHAT = (*EVERY, "turns", "shortest", "longest")
SHOWN = 1  # characters of a text that a frame holds: enough to see that it is there
FEW = ("text", "source", "licence")  # columns of few different values, each held but once
COLUMNS = {
    "corpus": (*EVERY, "licence", "absent_names"),
    "instructions": (*CHAT, "entity", "answer_given", "heldout_question", "pairs"),
    "rankings": (*CHAT, "responses", "repeated", "fit", "pairs"),
}


@dataclass(frozen=True)
class Expectation:
    """One expectation: a sentence for people, and the class and arguments for Great Expectations.

    Where it fails, refused rows explain it better than kept ones if it is about what was refused.
    """

    says: str
    type: str
    arguments: Mapping[str, Any]
    shows_refused: bool


@dataclass(frozen=True)
class Verdict:
    """What became of one expectation. `rows` are positions in the clean table, for examples."""

    suite: str
    says: str
    type: str
    success: bool
    observed: str
    unexpected: int
    rows: tuple[int, ...]
    shows_refused: bool


def _expect(says: str, kind: str, shows_refused: bool = False, **arguments: Any) -> Expectation:
    return Expectation(says, kind, arguments, shows_refused)


def suite(table: str, limits: Limits) -> list[Expectation]:
    """Return the expectations of a table."""
    rows, share = getattr(limits.rows, table), limits.refused_share
    most = _expect(f"at most {share:.0%} of the rows were refused", "ExpectColumnMaxToBeBetween",
                   column="refused_share", max_value=share, shows_refused=True)  # fmt: skip
    common = [
        _expect(
            f"there are at least {rows:,} rows", "ExpectTableRowCountToBeBetween", min_value=rows, shows_refused=True
        ),
        most,
        *(
            _expect(f"{column} is never null", "ExpectColumnValuesToNotBeNull", column=column)
            for column in FILLED[table]
        ),
        _expect("every id is unique", "ExpectColumnValuesToBeUnique", column="id"),
        _expect("no content comes twice", "ExpectColumnValuesToBeUnique", column="same"),
        _expect("the split is train or heldout", "ExpectColumnValuesToBeInSet", column="split", value_set=list(SPLITS)),
        _expect(
            "some rows are for training", "ExpectColumnDistinctValuesToContainSet", column="split", value_set=["train"]
        ),
        _expect("no text has damaged encoding", "ExpectColumnValuesToBeInSet", column="damaged", value_set=[False]),
    ]
    return common + {"corpus": _corpus, "instructions": _instructions, "rankings": _rankings}[table](limits)


def _corpus(limits: Limits) -> list[Expectation]:
    longest = limits.text_characters
    return [
        _expect(f"a document has 1 to {longest:,} characters", "ExpectColumnValuesToBeBetween",
                column="characters", min_value=1, max_value=longest),
        _expect("every name stands in its text", "ExpectColumnValuesToBeBetween", column="absent_names", max_value=0),
    ]  # fmt: skip


def _turns(limits: Limits, what: str) -> list[Expectation]:
    longest = limits.message_characters
    return [
        _expect("turns are in order: system (if any), then user and assistant by turns",
                "ExpectColumnValuesToMatchRegex", column="turns", regex=TURNS),
        _expect(f"no {what} is empty", "ExpectColumnValuesToBeBetween", column="shortest", min_value=1),
        _expect(f"no {what} is longer than {longest:,} characters", "ExpectColumnValuesToBeBetween",
                column="longest", max_value=longest),
    ]  # fmt: skip


def _instructions(limits: Limits) -> list[Expectation]:
    questions = limits.heldout_questions
    return [
        *_turns(limits, "message"),
        _expect("every reply holds its answer", "ExpectColumnValuesToBeInSet", column="answer_given", value_set=[True]),
        _expect("no entity's questions stand on both sides of the split", "ExpectColumnValuesToBeBetween",
                column="sides", max_value=1),
        _expect(f"there are at least {questions:,} different questions about held-out entities",
                "ExpectColumnUniqueValueCountToBeBetween", column="heldout_question", min_value=questions),
    ]  # fmt: skip


def _rankings(limits: Limits) -> list[Expectation]:
    return [
        *_turns(limits, "message or response"),
        _expect("there are two or more responses", "ExpectColumnValuesToBeBetween", column="responses", min_value=2),
        _expect("all of them are distinct", "ExpectColumnValuesToBeBetween", column="repeated", max_value=0),
        _expect("ranks or scores fit the responses and the scale", "ExpectColumnValuesToBeInSet",
                column="fit", value_set=["fits"]),
        _expect("no prompt with its response stands on both sides of the split", "ExpectColumnValuesToBeBetween",
                column="sides", max_value=1),
    ]  # fmt: skip


def seen_of(table: str, found: Sequence[Features]) -> "pa.Table":
    """Return what a suite looks at of some rows: some dozen bytes of each, and none of its text but the first sign."""
    import pyarrow as pa

    content = {column: [features[column] for features in found] for column in COLUMNS[table]}
    content["text"] = [text[:SHOWN] for text in content["text"]]
    return pa.table(content, schema(table))


def schema(table: str) -> "pa.Schema":
    """Return the types of what a suite looks at."""
    import pyarrow as pa

    kinds = {"pairs": pa.list_(pa.binary(16)), **dict.fromkeys(("damaged", "answer_given"), pa.bool_())}
    kinds |= dict.fromkeys(FEW, pa.dictionary(pa.int32(), pa.string()))
    kinds |= dict.fromkeys(("characters", "absent_names", "shortest", "longest", "responses", "repeated"), pa.int32())
    return pa.schema([(column, kinds.get(column, pa.string())) for column in COLUMNS[table]])


def frame_of(seen: "Sequence[pa.Table]", kept: Sequence[bool]) -> "pd.DataFrame":
    """Return one frame of the rows that are kept; where they have pairs, with the number of sides they stand on."""
    import pyarrow as pa

    whole = pa.concat_tables(seen).filter(pa.array(kept, pa.bool_())).unify_dictionaries()
    frame: pd.DataFrame = whole.drop_columns([name for name in ("pairs",) if name in whole.column_names]).to_pandas()
    if "pairs" in whole.column_names:
        frame["sides"] = sides(whole["pairs"].to_pylist(), whole["split"].to_pylist())
    return frame


def run(table: str, frame: "pd.DataFrame", refused_share: float, limits: Limits) -> list[Verdict]:
    """Validate the frame of a clean table against its suite, in one call, and return a verdict an expectation."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # read when the library is imported; nothing is to be sent
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    frame["refused_share"] = refused_share
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("tables").add_dataframe_asset(table)
    batch = asset.add_batch_definition_whole_dataframe("whole").get_batch({"dataframe": frame})
    expected = suite(table, limits)
    # Results come back in another order than the expectations went in; the number in `meta` brings them together.
    built = [
        getattr(gx.expectations, item.type)(**item.arguments, meta={"number": number})
        for number, item in enumerate(expected)
    ]
    result = batch.validate(gx.ExpectationSuite(name=table, expectations=built), result_format="COMPLETE")
    configured = {_number(item): item for item in result.results}
    return [_verdict(table, expectation, configured[number]) for number, expectation in enumerate(expected)]


def _number(item: Any) -> int:
    return int(item.expectation_config.meta["number"])


def _verdict(table: str, expectation: Expectation, item: Any) -> Verdict:
    # One exception is told flat, several are told by metric; either way the expectation was not looked at.
    told = [item.exception_info, *(info for info in item.exception_info.values() if isinstance(info, dict))]
    if any(info.get("raised_exception") for info in told):
        raise RuntimeError(f"suite {table}: {expectation.says!r} could not be computed: {item.exception_info}")
    found = item.result
    unexpected = int(found.get("unexpected_count") or 0)
    seen = f"{unexpected:,} of {found['element_count']:,} rows" if "element_count" in found else _observed(found)
    rows = tuple(int(row) for row in (found.get("unexpected_index_list") or [])[:EXAMPLES])
    return Verdict(
        suite=table,
        says=expectation.says,
        type=expectation.type,
        success=bool(item.success),
        observed=seen,
        unexpected=unexpected,
        rows=rows,
        shows_refused=expectation.shows_refused,
    )


def _observed(found: Mapping[str, Any]) -> str:
    """Write what an expectation about a whole column saw; the only fractions here are shares."""
    value = found.get("observed_value")
    if value is None:
        missing = ", ".join(map(str, found.get("partial_missing_list") or ()))
        return f"none with {missing}" if missing else ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"
