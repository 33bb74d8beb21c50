"""Gates: figures that must be within bounds for `package` to succeed.

A gate names a figure of the scorecard and an evaluated model (`metric: exact_match_heldout, model: chat`), or a figure
of a stage's own metrics and that stage (`metric: accuracy, model: reward@train`). A nested figure is named by its path
(`gap_at_least_1.model`). With `against` the value is the difference from that model's figure, with `relative` the
ratio to it. A gate that settings already rule out is a settings error (`tasks/rules/gates.py`). A figure that the
data do not give after all fails its gate, with the reason.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from tasks.common.settings import Settings

DECIMAL_PLACES = 4  # values are rounded before the comparison: 0.97 - 0.94 > 0.03 in floating point


class Gate(Settings):
    """A bound on one figure."""

    metric: str = Field(description="Figure of the scorecard, or of the stage's metrics", min_length=1)
    model: str = Field(description="Entry of evaluate, or a stage by its name: prune@small", min_length=1)
    against: str | None = Field(default=None, description="Model or stage to compare the figure with")
    relative: bool = Field(default=False, description="Divide by the figure of `against` instead of subtracting it")
    min: float | None = Field(default=None, description="Smallest value that passes")
    max: float | None = Field(default=None, description="Largest value that passes")

    @model_validator(mode="after")
    def _validate_bounds(self) -> "Gate":
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min or max, or both")
        if self.relative and self.against is None:
            raise ValueError("relative needs against, the model whose figure is the divisor")
        return self


def check(
    gate: Gate, figures: Mapping[str, Mapping[str, Any]], described: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a gate with its value and verdict, and the reason where it has no value.

    `figures` holds the figures of each model and stage by name, `described` each model's evaluations by name.
    """
    value = _value(gate, figures)
    passed = value is not None and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    reason = {"reason": _reason(gate, figures, described)} if value is None else {}
    return {**gate.model_dump(exclude_defaults=True), "value": value, "passed": passed, **reason}


def _reason(gate: Gate, figures: Mapping[str, Mapping[str, Any]], described: Mapping[str, Mapping[str, Any]]) -> str:
    """Return why a gate has no value: what the evaluations that gave nothing say."""
    for model in filter(None, (gate.model, gate.against)):
        if _figure(figures.get(model, {}), gate.metric) is None:
            absent = [f"{name}: {one['absent']}" for name, one in described.get(model, {}).items() if "absent" in one]
            because = f" ({'; '.join(absent)})" if absent else ""
            return f"{model} has no figure {gate.metric}{because}"
    return f"{gate.metric} of {gate.against} is 0, so nothing is relative to it"


def _value(gate: Gate, figures: Mapping[str, Mapping[str, Any]]) -> float | None:
    found = _figure(figures.get(gate.model, {}), gate.metric)
    if found is None or gate.against is None:
        return found
    other = _figure(figures.get(gate.against, {}), gate.metric)
    if other is None or (gate.relative and not other):
        return None
    return round(found / other if gate.relative else found - other, DECIMAL_PLACES)


def _figure(figures: Any, path: str) -> float | None:
    for name in path.split("."):
        figures = figures.get(name) if isinstance(figures, Mapping) else None
    known = isinstance(figures, int | float) and not isinstance(figures, bool)
    return round(float(figures), DECIMAL_PLACES) if known else None
