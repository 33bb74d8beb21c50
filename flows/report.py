"""The run report: one self-contained HTML page, `runs/<run id>/report.html`, and a copy as `runs/latest.html`.

Written at the end of every run and by `bessemer report`. It joins what DVC tracks (metrics, records, answers) with what
was measured (`runs/`), loads nothing from anywhere, runs no script, and shows a sentence where a part has no results.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import report_answers, report_limits, report_parts, report_sheet
from flows.results import Results, last_run
from tasks.common.settings import BessemerError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
LATEST = Path("runs/latest.html")
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError)


class ReportError(BessemerError):
    """There is nothing to report on; the text says what to do."""


def write_report(project: Path, run_id: str) -> Path:
    """Write the page of a run and return where it lies."""
    results = Results(project, run_id)
    path = project / "runs" / run_id / "report.html"
    for target in (path, project / LATEST):
        text = page(results, os.path.relpath(project, target.parent))
        target.parent.mkdir(parents=True, exist_ok=True)
        neighbour = target.with_name(f".{target.name}.{os.getpid()}")
        neighbour.write_bytes(text.encode("utf-8", "replace"))  # a model's reply may hold half a character
        neighbour.replace(target)
    return path


def write_last_report(project: Path) -> Path:
    """Write the page of the run whose results lie in the project, and return where it lies."""
    run_id = last_run(project)
    if not run_id:
        raise ReportError(f"There is no run of what lies in {project.resolve()} yet: `bessemer run` makes one.")
    return write_report(project, run_id)


def page(run: Results, home: str = ".") -> str:
    """Return the page of a run; `home` is the way from where it will lie to the project, for its links."""
    parts: dict[str, Callable[[Results], Any]] = {
        "headline": report_parts.headline,
        "tiles": report_sheet.tiles,
        "lineage": report_parts.lineage,
        "data": report_parts.data,
        "training": report_parts.training,
        "evaluation": report_sheet.evaluation,
        "reward": report_parts.reward,
        "ppo": report_parts.ppo,
        "answers": report_answers.answers,
        "size": report_parts.size,
        "stages": report_parts.stages,
        "limits": report_limits.limits,
    }
    problems: dict[str, str] = {}
    found = {name: _made(part, run, name, problems) for name, part in parts.items()}
    template = _environment().get_template("report.html.j2")
    return template.render(run=run.id, home=home, problems=problems, written=datetime.now(UTC), **found)


def _made(part: Callable[[Results], Any], run: Results, name: str, problems: dict[str, str]) -> Any:
    """Return a part of the page; files of another shape (an older run's, a half-edited one) cost that part alone."""
    try:
        return part(run)
    except MALFORMED as error:
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
    """Return a figure in the unit of its kind: share, points, count, bytes, times, number."""
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
    """Return a difference with its sign: of a share in percentage points, a relative one in percent or as a factor."""
    if kind == "share":
        return _signed(f"{100 * value:+.1f}")
    if kind == "relative":
        return f"× {value + 1:.0f}" if value >= 9 else _signed(f"{100 * value:+.0f} %")
    return _signed(f"{value:+.2f}")


def thousands(value: float) -> str:
    """Return a whole number in groups of three digits."""
    return f"{value:,.0f}".replace(",", "\u202f")


def size(value: float) -> str:
    """Return a number of bytes as people say it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
    return f"{value:.0f} bytes"


def span(seconds: float) -> str:
    """Return a span of time as people say it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def money(value: float) -> str:
    """Return an amount with as many digits as tell something."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def _signed(text: str) -> str:
    """Give a number a true minus sign, and none to what was rounded to zero."""
    return text.replace("-", "−") if any(digit in text for digit in "123456789") else text.strip("+-")
