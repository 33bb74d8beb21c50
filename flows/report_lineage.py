"""The lineage diagram of the run report: DVC's graph in layers from left to right, as inline SVG.

A layered layout as in Sugiyama, Tagawa & Toda 1981: each stage stands one layer after the last of those it needs, edges
over several layers get a place in each, the order within a layer is swept until fewer edges cross, and heights are
then pulled towards their neighbours.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil

from markupsafe import Markup

WIDTH, HEIGHT, GAP_X, GAP_Y, BEND = 92.0, 50.0, 25.0, 12.0, 8.0
SWEEPS = 8


@dataclass(frozen=True)
class Box:
    """One stage as it is drawn."""

    name: str
    needs: Sequence[str]
    status: str
    hash: str
    link: str
    title: str


@dataclass
class Spot:
    """A place in a layer: a stage's, or that of an edge which passes through (then `name` is None)."""

    name: str | None
    layer: int
    before: "list[Spot]"
    after: "list[Spot]"
    y: float = 0.0

    @property
    def height(self) -> float:
        """How much room it takes."""
        return HEIGHT if self.name else BEND


def draw(boxes: Sequence[Box]) -> Markup:
    """Draw the stages and what they need; empty where there are none."""
    if not boxes:
        return Markup("")
    layers = layout({box.name: box.needs for box in boxes})
    spots = {spot.name: spot for layer in layers for spot in layer if spot.name}
    edges = [_edge(spot, target) for spot in spots.values() for target in spot.after]
    bottom = ceil(max(spot.y + spot.height / 2 for layer in layers for spot in layer) + 1)
    right = len(layers) * (WIDTH + GAP_X) - GAP_X + 2
    drawn = [_box(box, spots[box.name]) for box in boxes]
    head = f'<svg class="lineage" viewBox="0 0 {right:.0f} {bottom}" role="img" aria-label="Lineage of the stages">'
    return Markup(f'{head}<path class="edge" d="{"".join(edges)}"/>{"".join(drawn)}</svg>')


def layout(needs: Mapping[str, Sequence[str]]) -> list[list[Spot]]:
    """Return the layers with their spots, ordered from top to bottom and placed."""
    layers = _spread(closest(needs))
    best, fewest = [list(layer) for layer in layers], crossings(layers)
    for sweep in range(SWEEPS):
        for layer in layers[1:] if sweep % 2 == 0 else reversed(layers[:-1]):
            _sort(layer, layers, forwards=sweep % 2 == 0)
        if (found := crossings(layers)) < fewest:
            best, fewest = [list(layer) for layer in layers], found
    _place(best)
    return best


def closest(needs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the needs of each stage that none of its other needs already stands for."""
    behind: dict[str, set[str]] = {}

    def all_behind(name: str) -> set[str]:
        if name not in behind:
            direct = [need for need in needs.get(name, ()) if need in needs]
            behind[name] = set(direct).union(*(all_behind(need) for need in direct))
        return behind[name]

    return {
        name: [
            need
            for need in own
            if need in needs and not any(need in all_behind(other) for other in own if other in needs)
        ]
        for name, own in needs.items()
    }


def crossings(layers: Sequence[Sequence[Spot]]) -> int:
    """Return how many pairs of edges cross."""
    count = 0
    for layer, following in pairwise(layers):
        place = {id(spot): index for index, spot in enumerate(following)}
        ends = [(index, place[id(target)]) for index, spot in enumerate(layer) for target in spot.after]
        count += sum(a < c and b > d for a, b in ends for c, d in ends)
    return count


def _spread(needs: Mapping[str, Sequence[str]]) -> list[list[Spot]]:
    """Put every stage on its layer and give edges over several layers a spot in each."""
    spots: dict[str, Spot] = {}
    pending = dict(needs)
    while pending:
        for name in [name for name, own in pending.items() if all(need in spots for need in own)]:
            layer = 1 + max((spots[need].layer for need in pending.pop(name)), default=-1)
            spots[name] = Spot(name, layer, [], [])
    layers: list[list[Spot]] = [[] for _ in range(1 + max(spot.layer for spot in spots.values()))]
    for spot in spots.values():
        layers[spot.layer].append(spot)
    for name, own in needs.items():
        for need in own:
            last = spots[need]
            for layer in range(last.layer + 1, spots[name].layer):
                bend = Spot(None, layer, [], [])
                layers[layer].append(bend)
                _join(last, bend)
                last = bend
            _join(last, spots[name])
    return layers


def _join(first: Spot, second: Spot) -> None:
    first.after.append(second)
    second.before.append(first)


def _sort(layer: list[Spot], layers: Sequence[Sequence[Spot]], *, forwards: bool) -> None:
    """Order a layer by where each spot's neighbours stand, in the mean, in the layer before it (or after it)."""
    places = {id(spot): index for other in layers for index, spot in enumerate(other)}
    layer.sort(key=lambda spot: _mean([places[id(near)] for near in (spot.before if forwards else spot.after)]))


def _place(layers: Sequence[Sequence[Spot]]) -> None:
    """Give every spot its height: pulled towards its neighbours' mean, never over the next in its layer."""
    for layer in layers:
        _stack(layer, [0.0] * len(layer))
    for turn in range(24):
        for layer in layers if turn % 2 == 0 else reversed(layers):
            near = [(spot.before if turn % 2 == 0 else spot.after) or [*spot.before, *spot.after] for spot in layer]
            _stack(layer, [_mean([other.y for other in others]) for others in near])
    top = min(spot.y - spot.height / 2 for layer in layers for spot in layer) - 1
    for layer in layers:
        for spot in layer:
            spot.y -= top


def _stack(layer: Sequence[Spot], wanted: Sequence[float]) -> None:
    """Place a layer's spots in order, as near to the wanted heights as their sizes let them: halfway between the
    lowest placement that pushes downwards and the highest that pushes upwards."""
    down: list[float] = []
    for index, spot in enumerate(layer):
        least = down[-1] + _apart(layer[index - 1], spot) if index else wanted[index]
        down.append(max(wanted[index], least))
    up = [0.0] * len(layer)
    for index in reversed(range(len(layer))):
        most = up[index + 1] - _apart(layer[index], layer[index + 1]) if index + 1 < len(layer) else wanted[index]
        up[index] = min(wanted[index], most)
    for spot, low, high in zip(layer, down, up, strict=True):
        spot.y = (low + high) / 2


def _apart(first: Spot, second: Spot) -> float:
    return (first.height + second.height) / 2 + GAP_Y


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _edge(start: Spot, following: Spot) -> str:
    """Return the path of one edge, from a stage through its bends to the next stage."""
    x, y = start.layer * (WIDTH + GAP_X) + 1 + WIDTH, start.y
    path = f"M{x:.1f} {y:.1f}"
    spot = following
    while True:
        left = spot.layer * (WIDTH + GAP_X) + 1
        half = (left - x) / 2
        path += f"C{x + half:.1f} {y:.1f} {left - half:.1f} {spot.y:.1f} {left:.1f} {spot.y:.1f}"
        if spot.name:
            return path
        path += f"H{left + WIDTH:.1f}"
        x, y, spot = left + WIDTH, spot.y, spot.after[0]


def _box(box: Box, spot: Spot) -> str:
    left, top = spot.layer * (WIDTH + GAP_X) + 1, spot.y - HEIGHT / 2
    stage, _, key = box.name.partition("@")
    texts = [("name", stage), ("key", key), ("hash", box.hash)]
    shown = [(css, text) for css, text in texts if text]
    first = spot.y + 4 - 7 * (len(shown) - 1)
    lines = "".join(
        f'<text class="{css}" x="{left + 10:.1f}" y="{first + 14 * index:.1f}">{escape(text)}</text>'
        for index, (css, text) in enumerate(shown)
    )
    css = f"box {box.status.replace(' ', '-')}"
    shape = f'<rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    mark = f'<path class="mark" d="M{left + 2.5:.1f} {top + 8:.1f}v{HEIGHT - 16}"/>'
    return f'<a class="{css}" href="{escape(box.link)}"><title>{escape(box.title)}</title>{shape}{mark}{lines}</a>'
