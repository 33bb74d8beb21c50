"""The lineage diagram of the run report: DVC's graph in layers from left to right, as inline SVG.

grandalf computes the layers, the order within them and the positions (Sugiyama, Tagawa & Toda 1981). It lays graphs
out from top to bottom, so its x axis is the vertical axis here.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations, pairwise
from math import ceil
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT, GAP_X, GAP_Y, BEND_HEIGHT = 92.0, 50.0, 25.0, 12.0, 8.0
ORDERS_TRIED = 24
ORDERING_ROUNDS = 12  # of grandalf's layer ordering; more rounds change nothing in graphs of this size
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A stage in the diagram."""

    name: str
    needs: Sequence[str]
    status: str
    hash: str
    link: str
    title: str


@dataclass(frozen=True)
class Layout:
    """The centres of the boxes, and each edge as points from centre to centre, one per layer."""

    boxes: dict[str, Point]
    edges: list[list[Point]]

    @property
    def size(self) -> Point:
        """Width and height."""
        points = [*self.boxes.values(), *(point for edge in self.edges for point in edge)]
        return max(x for x, _ in points) + WIDTH / 2 + 1, max(y for _, y in points) + HEIGHT / 2 + 1


def draw(boxes: Sequence[Box]) -> Markup:
    """Draw the stages and their dependencies; empty if there are no stages."""
    if not boxes:
        return Markup("")
    found = layout({box.name: box.needs for box in boxes})
    right, bottom = map(ceil, found.size)
    shapes = [_box(box, *found.boxes[box.name]) for box in boxes]
    edges = "".join(map(_edge, found.edges))
    head = f'<svg class="lineage" viewBox="0 0 {right} {bottom}" role="img" aria-label="Lineage of the stages">'
    return Markup(f'{head}<path class="edge" d="{edges}"/>{"".join(shapes)}</svg>')


def layout(needs: Mapping[str, Sequence[str]]) -> Layout:
    """Return the layout of a graph; its connected components are placed below one another."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(needs)
    graph.add_edges_from((need, name) for name, own in direct_needs(needs).items() for need in own)
    found, top = Layout({}, []), 1.0
    for names in nx.weakly_connected_components(graph):
        part = graph.subgraph(names)
        best = _best_layout([name for name in needs if name in names], list(part.edges))
        found.boxes.update((name, (x, y + top)) for name, (x, y) in best.boxes.items())
        found.edges.extend([(x, y + top) for x, y in edge] for edge in best.edges)
        top = found.size[1] + GAP_Y
    return found


def direct_needs(needs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the direct dependencies of each stage: the transitive reduction of the graph."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(needs)
    graph.add_edges_from((need, name) for name, own in needs.items() for need in own if need in needs)
    reduced = nx.transitive_reduction(graph)  # its edge order differs between processes
    return {name: [need for need in own if reduced.has_edge(need, name)] for name, own in needs.items()}


def crossings(edges: Sequence[Sequence[Point]]) -> int:
    """Return how many pairs of edges cross between two layers."""
    steps = [step for edge in edges for step in pairwise(edge)]
    return sum(
        first[0][0] == second[0][0] and (first[0][1] - second[0][1]) * (first[1][1] - second[1][1]) < 0
        for first, second in combinations(steps, 2)
    )


def _best_layout(names: list[str], edges: list[tuple[str, str]]) -> Layout:
    """Return the layout of a connected graph with the fewest edge crossings.

    grandalf's result depends on the order of vertices and edges, so this tries ORDERS_TRIED random orders with fixed
    seeds.
    """
    found = []
    for seed in range(ORDERS_TRIED):
        draw_order = random.Random(seed)
        found.append(_grandalf_layout(draw_order.sample(names, len(names)), draw_order.sample(edges, len(edges))))
    return min(found, key=lambda layout: crossings(layout.edges))


def _grandalf_layout(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> Layout:
    """Return grandalf's layout of a connected graph, with its top at 0.

    This avoids grandalf's class `Graph`, which keeps edges in a set and so gives another layout in each process.
    """
    from grandalf.graphs import Edge, Vertex, graph_core
    from grandalf.layouts import SugiyamaLayout, VertexViewer
    from grandalf.routing import EdgeViewer

    vertices = {name: Vertex(name) for name in names}
    for vertex in vertices.values():
        vertex.view = VertexViewer(w=HEIGHT, h=WIDTH)
    joined = [Edge(vertices[need], vertices[name]) for need, name in edges]
    for edge in joined:
        edge.view = EdgeViewer()
    sugiyama = SugiyamaLayout(graph_core([*vertices.values()], joined))
    sugiyama.xspace, sugiyama.yspace, sugiyama.dw, sugiyama.dh = GAP_Y, GAP_X, BEND_HEIGHT, WIDTH
    sugiyama.init_all()
    sugiyama.draw(ORDERING_ROUNDS)
    return _layout_of(sugiyama)


def _layout_of(sugiyama: Any) -> Layout:
    """Convert grandalf's layout to one from left to right."""
    views = [vertex.view for layer in sugiyama.layers for vertex in layer]
    top = min(view.xy[0] - view.w / 2 for view in views)

    def position(vertex: Any) -> Point:
        return 1 + WIDTH / 2 + sugiyama.grx[vertex].rank * (WIDTH + GAP_X), vertex.view.xy[0] - top

    found = Layout({vertex.data: position(vertex) for vertex in sugiyama.g.V()}, [])
    for edge in sugiyama.g.E():
        start, end = edge.v
        bends = [bend for _, bend in sorted(sugiyama.ctrls.get(edge, {}).items()) if bend not in (start, end)]
        found.edges.append([position(start), *map(position, bends), position(end)])
    return found


def _edge(points: Sequence[Point]) -> str:
    """Return the SVG path of one edge, from the right side of a box through its bends to the left side of another."""
    (x, y), *_ = points
    path = f"M{x + WIDTH / 2:.1f} {y:.1f}"
    for (x, y), (following, height) in pairwise(points):
        start, end = x + WIDTH / 2, following - WIDTH / 2
        half = (start + end) / 2
        path += f"C{half:.1f} {y:.1f} {half:.1f} {height:.1f} {end:.1f} {height:.1f}"
        if (following, height) != points[-1]:
            path += f"H{end + WIDTH:.1f}"
    return path


def _box(box: Box, x: float, y: float) -> str:
    left, top = x - WIDTH / 2, y - HEIGHT / 2
    stage, _, key = box.name.partition("@")
    texts = [("name", stage), ("key", key), ("hash", box.hash)]
    shown = [(css, text) for css, text in texts if text]
    first = y + 4 - 7 * (len(shown) - 1)
    lines = "".join(
        f'<text class="{css}" x="{left + 10:.1f}" y="{first + 14 * index:.1f}">{escape(text)}</text>'
        for index, (css, text) in enumerate(shown)
    )
    css = f"box {box.status.replace(' ', '-')}"
    shape = f'<rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    mark = f'<path class="mark" d="M{left + 2.5:.1f} {top + 8:.1f}v{HEIGHT - 16}"/>'
    return f'<a class="{css}" href="{escape(box.link)}"><title>{escape(box.title)}</title>{shape}{mark}{lines}</a>'
