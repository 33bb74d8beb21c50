"""The run report: one self-contained HTML page, `runs/<run id>/report.html`, and a copy as `runs/latest.html`.

Written at the end of every run and by `bessemer report`. It joins DVC's outputs (metrics, records, answers) with the
logs in `runs/`. The page loads no resources and runs no script; a section without results shows a message.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.report import (
    answers,
    limits,
    parts,
    scorecard,
)
from flows.results import Results, last_run
from tasks.common.settings import BessemerError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
LATEST = Path("runs/latest.html")
MALFORMED_FILE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)


class ReportError(BessemerError):
    """There is no run to report on; the text says what to do."""


def write_report(project: Path, run_id: str) -> Path:
    """Write the report of a run and return its path."""
    content = _build_content(Results(project, run_id))
    template = _environment().get_template("report.html.j2")
    path = project / "runs" / run_id / "report.html"
    for target in (path, project / LATEST):
        text = template.render(home=os.path.relpath(project, target.parent), **content)  # `home` is for its links
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_bytes(text.encode("utf-8", "replace"))  # a model's reply may contain a lone surrogate
        temporary.replace(target)
    return path


def write_last_report(project: Path) -> Path:
    """Write the report of the newest run whose results are the current ones; return its path."""
    run_id = last_run(project)
    if not run_id:
        raise ReportError(f"{project.resolve()} contains no results of a run yet: run `bessemer run` first.")
    return write_report(project, run_id)


def _build_content(run: Results) -> dict[str, Any]:
    """Return what the page of a run shows, by the template's names."""
    sections: dict[str, Callable[[Results], Any]] = {
        "headline": parts.headline,
        "tiles": scorecard.tiles,
        "lineage": parts.lineage,
        "data": parts.data,
        "training": parts.training,
        "evaluation": scorecard.evaluation,
        "reward": parts.reward,
        "alignment": parts.alignment,
        "answers": answers.answers,
        "size": parts.size,
        "stages": parts.stages,
        "limits": limits.limits,
    }
    problems: dict[str, str] = {}
    found = {name: _build_part(part, run, name, problems) for name, part in sections.items()}
    return {"run": run.id, "problems": problems, "written": datetime.now(UTC), **found}


def _build_part(part: Callable[[Results], Any], run: Results, name: str, problems: dict[str, str]) -> Any:
    """Return a section of the page; malformed files (of an older version, or edited) affect only that section."""
    try:
        return part(run)
    except MALFORMED_FILE_ERRORS as error:
        problems[name] = f"{type(error).__name__}: {error}"
        return {}


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "figure": figure, "change": change, "thousands": thousands, "size": size, "span": span, "money": money,
    }  # fmt: skip
    return environment


def figure(value: float | None, kind: str) -> str:
    """Format a figure by its kind: share, points, count, bytes, times, number."""
    if value is None:
        return "–"
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind in ("points", "change"):
        return _signed(f"{value:+.2f}")
    if kind == "times":
        return f"{value:.3f} ×"
    if kind == "bytes":
        return size(value)
    return thousands(value) if kind == "count" or value >= 1000 else f"{value:.2f}"


def change(value: float, kind: str) -> str:
    """Format a difference with its sign: of a share in percentage points, a relative one in percent or as a factor."""
    if kind == "share":
        return _signed(f"{100 * value:+.1f}")
    if kind == "relative":
        decimals = 1 if abs(value) < 0.01 else 0  # else a significant change of 0.3 % would read as none
        return f"× {value + 1:.0f}" if value >= 9 else _signed(f"{100 * value:+.{decimals}f} %")
    return _signed(f"{value:+.2f}")


def thousands(value: float) -> str:
    """Format a whole number in groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")


def size(value: float) -> str:
    """Format a number of bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} bytes"


def span(seconds: float) -> str:
    """Format a duration."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def money(value: float) -> str:
    """Format an amount of money."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _signed(text: str) -> str:
    """Use a true minus sign, and no sign for a number that rounds to zero."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.strip("+-")
