"""The charts of the run report as inline SVG, without a plotting library or script.

A chart is a string of markup. Its strokes and fills have class names (`s1` … `s6`, `grid`, `axis`), which the page's
light and dark colour schemes define. All text from data is escaped here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

Point = tuple[float, float]
WIDTH, HEIGHT, TALL_HEIGHT = 400.0, 236.0, 300.0
RIGHT_MARGIN, TOP_MARGIN, BOTTOM_MARGIN = 12.0, 14.0, 42.0
LETTER_WIDTH = 7.0  # width of a tick label's character


@dataclass(frozen=True)
class Series:
    """One line of a chart; its colour is a class of the page's CSS."""

    name: str
    colour: str
    points: Sequence[Point]
    spread: Sequence[float] = ()  # half the height of the band around the line at each point


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line with a label: a target, a limit, a held-out loss."""

    value: float
    label: str


@dataclass(frozen=True)
class Whisker:
    """A value with its interval at the category `index` of the x axis."""

    index: int
    value: float
    low: float
    high: float


def line(
    series: Sequence[Series], x: str, y: str, levels: Sequence[Level] = (), zero: bool = False, percent: bool = False
) -> Markup:
    """Draw lines over an x axis of integers; with `zero` the y axis includes 0."""
    shown = [_finite(item) for item in series]
    xs = [point[0] for item in shown for point in item.points]
    ys = [value for item in shown for value in _extent(item)] + [level.value for level in levels]
    if not xs:
        return Markup("")
    frame = Frame(Axis.over(xs, nice=False, whole=True), Axis.over([*ys, 0.0] if zero else ys), percent)
    parts = [frame.axes(x, y)]
    parts += [_level(frame, level) for level in levels]
    for item in shown:
        if item.spread:
            parts.append(_band(frame, item))
        parts.append(f'<path class="line {item.colour}" d="{_path(frame, item.points)}"/>')
        if len(item.points) == 1:
            parts += [_dot(frame, item.colour, point, f"{item.name}: {number(point[1])}") for point in item.points]
    return _svg(frame, parts, f"{y} over {x}: {', '.join(item.name for item in shown)}")


def whiskers(labels: Sequence[str], groups: Sequence[tuple[str, str, Sequence[Whisker]]], y: str) -> Markup:
    """Draw shares (0 to 1) with their intervals: groups (name, colour, values) side by side at each label."""
    frame = Frame(Axis(-0.5, len(labels) - 0.5, ()), Axis(0.0, 1.0, (0.0, 0.25, 0.5, 0.75, 1.0)), True, TALL_HEIGHT)
    parts = [frame.axes("", y)]
    for index, label in enumerate(labels):
        parts.append(_text(frame.x(index), frame.floor + 18, label, "tick", "middle"))
    for index, (name, colour, values) in enumerate(groups):
        shift = (index - (len(groups) - 1) / 2) * 0.22
        points = [(item.index + shift, item.value) for item in values]
        parts.append(f'<path class="line thin {colour}" d="{_path(frame, points)}"/>')
        for item, point in zip(values, points, strict=True):
            across = frame.x(point[0])
            low, high = frame.y(item.low), frame.y(item.high)
            parts.append(f'<path class="line {colour}" d="M{across:.1f} {low:.1f}V{high:.1f}"/>')
            parts.append(_dot(frame, colour, point, f"{labels[item.index]}, {name}: {100 * item.value:.1f} %"))
    return _svg(frame, parts, f"{y}, by model: {', '.join(name for name, _, _ in groups)}")


def calibration(points: Sequence[Point], x: str, y: str) -> Markup:
    """Draw points and the diagonal of perfect calibration; both axes have the same scale."""
    points = [point for point in points if all(map(math.isfinite, point))]
    if not points:
        return Markup("")
    axis = Axis.over([value for point in points for value in point])
    frame = Frame(axis, axis, height=TALL_HEIGHT)
    diagonal = _path(frame, [(axis.low, axis.low), (axis.high, axis.high)])
    parts = [frame.axes(x, y), f'<path class="level" d="{diagonal}"/>']
    parts += [_dot(frame, "s1", point, f"{x} {number(point[0])}, {y} {number(point[1])}", 4.5) for point in points]
    return _svg(frame, parts, f"{y} against {x}")


def histograms(groups: Sequence[tuple[str, str, Sequence[float]]], x: str, y: str, bins: int = 24) -> Markup:
    """Draw histograms of groups (name, colour, values) as outlines over the same bins."""
    values = [value for _, _, group in groups for value in group if math.isfinite(value)]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    width = (high - low or 1.0) / bins
    shapes: list[tuple[str, str, list[float]]] = []
    for name, colour, group in groups:
        counts = [0.0] * bins
        for value in group:
            if math.isfinite(value):
                counts[min(int((value - low) / width), bins - 1)] += 1 / len(group)
        shapes.append((name, colour, counts))
    top = Axis.over([0.0, *(share for _, _, counts in shapes for share in counts)])
    frame = Frame(Axis.over([low, low + width * bins], nice=False), top, True)
    parts = [frame.axes(x, y)]
    for _, colour, counts in shapes:
        outline = f"M{frame.x(low):.1f} {frame.y(0):.1f}"
        for index, share in enumerate(counts):
            outline += f"V{frame.y(share):.1f}H{frame.x(low + (index + 1) * width):.1f}"
        parts.append(f'<path class="area {colour}" d="{outline}V{frame.y(0):.1f}Z"/>')
    return _svg(frame, parts, f"{y} by {x}: {', '.join(name for name, _, _ in groups)}")


@dataclass(frozen=True)
class Axis:
    """The range of an axis and where its ticks are."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], nice: bool = True, whole: bool = False) -> "Axis":
        """Return an axis over the values; `nice` extends it to its outer ticks, `whole` puts ticks at integers."""
        low, high = min(values), max(values)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
            low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
        step = _step(max((high - low) / 4, 1.0) if whole else (high - low) / 4, whole)
        first = math.floor(low / step + 1e-9) if nice else math.ceil(low / step - 1e-9)
        last = math.ceil(high / step - 1e-9) if nice else math.floor(high / step + 1e-9)
        ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks) if nice else cls(low, high, ticks)

    def fraction(self, value: float) -> float:
        """Return the relative position of a value, 0 at the low end and 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Frame:
    """Two axes laid on the chart's area."""

    across: Axis
    up: Axis
    percent: bool = False
    height: float = HEIGHT

    @property
    def left(self) -> float:
        """Where the area begins: right of the axis' name and its longest tick."""
        return 28 + LETTER_WIDTH * max(len(self.tick_label(tick)) for tick in self.up.ticks)

    @property
    def floor(self) -> float:
        """Where the area ends at the bottom."""
        return self.height - BOTTOM_MARGIN

    def x(self, value: float) -> float:
        """Return a value's horizontal position."""
        return self.left + self.across.fraction(value) * (WIDTH - self.left - RIGHT_MARGIN)

    def y(self, value: float) -> float:
        """Return a value's vertical position."""
        return self.floor - self.up.fraction(value) * (self.floor - TOP_MARGIN)

    def tick_label(self, tick: float) -> str:
        """Return the label of a tick of the y axis."""
        return f"{number(100 * tick)} %" if self.percent else number(tick)

    def axes(self, x: str, y: str) -> str:
        """Draw grid lines, ticks and labels."""
        left, end, floor = self.left, WIDTH - RIGHT_MARGIN, self.floor
        parts = []
        for tick in self.up.ticks:
            at = self.y(tick)
            parts.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{end}"/>')
            parts.append(_text(left - 7, at + 4, self.tick_label(tick), "tick", "end"))
        parts.append(f'<path class="axis" d="M{left:.1f} {floor}H{end}"/>')
        for tick in self.across.ticks:
            at = self.x(tick)
            parts.append(f'<path class="axis" d="M{at:.1f} {floor}v4"/>')
            parts.append(_text(at, floor + 18, number(tick), "tick", "middle"))
        parts.append(_text((left + end) / 2, self.height - 6, x, "label", "middle"))
        middle = (TOP_MARGIN + floor) / 2
        parts.append(_text(11, middle, y, "label", "middle", f'transform="rotate(-90 11 {middle:.1f})"'))
        return "".join(parts)


def number(value: float) -> str:
    """Format a number for an axis, with a true minus sign."""
    if value != 0 and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}".replace("-", "−")
    text = f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−").replace(",", "\u202f")


def _step(rough: float, whole: bool) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    return next(factor * scale for factor in factors if factor * scale >= rough * 0.999)


def _finite(series: Series) -> Series:
    spread = series.spread or [0.0] * len(series.points)
    finite = [(p, s) for p, s in zip(series.points, spread, strict=True) if all(map(math.isfinite, (*p, s)))]
    return Series(series.name, series.colour, [p for p, _ in finite], [s for _, s in finite] if series.spread else ())


def _extent(series: Series) -> list[float]:
    spread = series.spread or [0.0] * len(series.points)
    return [value + sign * s for (_, value), s in zip(series.points, spread, strict=True) for sign in (-1, 1)]


def _path(frame: Frame, points: Sequence[Point]) -> str:
    return "".join(f"{'L' if index else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}" for index, (x, y) in enumerate(points))


def _band(frame: Frame, series: Series) -> str:
    pairs = list(zip(series.points, series.spread, strict=True))
    edge = [(x, y + s) for (x, y), s in pairs] + [(x, y - s) for (x, y), s in reversed(pairs)]
    return f'<path class="band {series.colour}" d="{_path(frame, edge)}Z"/>'


def _level(frame: Frame, level: Level) -> str:
    at = frame.y(level.value)
    above = at - 5 if at > TOP_MARGIN + 12 else at + 14
    path = f'<path class="level" d="M{frame.left:.1f} {at:.1f}H{WIDTH - RIGHT_MARGIN}"/>'
    return path + _text(WIDTH - RIGHT_MARGIN - 2, above, level.label, "note", "end")


def _dot(frame: Frame, colour: str, point: Point, title: str, radius: float = 3.5) -> str:
    center = f'cx="{frame.x(point[0]):.1f}" cy="{frame.y(point[1]):.1f}"'
    return f'<circle class="dot {colour}" {center} r="{radius}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, css: str, anchor: str, more: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _svg(frame: Frame, parts: Sequence[str], title: str) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH:g} {frame.height:g}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
