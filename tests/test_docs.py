"""The documentation: generated pages are current, and every link, path and command that a page names exists."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

from flows import cli_reference
from flows.cli import cli
from tasks.common import tables
from tasks.common.params_file import check
from tasks.common.settings import ENTRY_SECTIONS, STAGES
from tasks.ingest import formats, layouts, rows, turns
from tests.conftest import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "data/sources/**/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A page of docs/ with or without an anchor, as docstrings, messages and settings name it.
DOCS_PATH = re.compile(r"(?<![\w/])docs/[\w./-]+\.(?:md|png)(?:#[\w-]+)?")
ENTRIES = ENTRY_SECTIONS  # whose keys are users' names
CODE = ("tasks", "flows", "serving", "tests", "benchmarks", "profiles")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Return a page's text without its blocks of code, in which `](` is no link."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return the anchors of a page, as GitHub makes them from its headings, and those set by hand."""
    text = without_code(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return frozenset(slugs | set(re.findall(r'<a id="([\w-]+)"', text)))


def missing(target: str, page: Path) -> bool:
    """Return whether a relative link of a page is broken."""
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return True
    return bool(anchor) and path.suffix == ".md" and anchor not in anchors(path)


def test_cli_reference_is_current() -> None:
    page = (ROOT / cli_reference.PAGE).read_text(encoding="utf-8")
    assert page == cli_reference.render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_exist(page: Path) -> None:
    links = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    relative = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in relative if missing(link, page)] == []


def sources() -> Iterator[Path]:
    """Yield the files whose comments and messages may name a page."""
    yield from (ROOT / name for name in ("Makefile", "params.yaml", "dvc.yaml", "prefect.yaml"))
    for folder in CODE:
        yield from (path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".yaml", ".html"))


def test_pages_named_in_code_and_settings_exist() -> None:
    named = {
        (name_of(path), page) for path in sources() for page in DOCS_PATH.findall(path.read_text(encoding="utf-8"))
    }
    assert sorted(pair for pair in named if missing(pair[1], ROOT / "README.md")) == []


def test_every_page_of_docs_is_listed_in_its_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text(encoding="utf-8"))
    }
    assert [name_of(page) for page in (ROOT / "docs").rglob("*.md") if page != index and page not in linked] == []


def test_commands_in_pages_exist() -> None:
    """`bessemer NAME` in a page is a command."""
    known = {
        path.removeprefix("bessemer ")
        for path, _ in cli_reference.commands(cli, click.Context(cli, info_name="bessemer"))
    }
    for page in PAGES:
        if page.name in ("LOG.md", "CHANGELOG.md"):
            continue
        used = set(re.findall(r"(?:^|`)bessemer ([a-z]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert used <= known, name_of(page)


def test_api_reference_lists_every_route() -> None:
    """Headings `METHOD /path` and the table of pages together are the routes that are served."""
    from serving import openai_api, pages
    from serving.feedback import api as feedback_api

    routes = [*pages.ROUTES, *feedback_api.ROUTES, *openai_api.ROUTES]
    service = (ROOT / "serving/service.py").read_text(encoding="utf-8")  # importing it starts BentoML
    served = {getattr(route, "path", "").replace(":path", "").replace("/{rest}", "") for route in routes}
    served |= set(re.findall(r'@bentoml\.api\(route="(\S+?)"', service))
    text = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^## (?:GET|POST) (\S+)$", text, flags=re.MULTILINE))
    documented |= {path.rstrip("/.") or "/" for path in re.findall(r"^\| `GET (\S+)`", text, flags=re.MULTILINE)}
    assert documented == served - {"/v1"}


def test_source_formats_list_the_columns_of_tables() -> None:
    text = (ROOT / "docs/reference/formats.md").read_text(encoding="utf-8")
    for table in tables.TABLES:
        section = text.partition(f"\n### {table}\n")[2].partition("\n### ")[0]
        rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, flags=re.MULTILINE)
        documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
        assert sorted(documented) == sorted(tables.schema(table).names), table


def test_source_formats_list_every_format_suffix_and_column() -> None:
    text = (ROOT / "docs/reference/formats.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([^`\n]+)`", text.replace("```", "")))
    own = {name for table in rows.REQUIRED_COLUMNS for name in rows.known_columns(table)}
    columns = {name for names in layouts.FORMAT_COLUMNS.values() for name in names}
    columns -= {"fields", "data", "annotations"}  # of exports, which the guide to rankings describes
    named = {*formats.FILE_FORMATS, *formats.SUFFIXES, *layouts.LAYOUTS, *columns, *own}
    named |= {*layouts.QUESTIONS, *layouts.REPLIES, *layouts.CONTEXTS, *turns.REASONING_FIELDS}
    assert sorted(named - documented) == []


def test_settings_named_in_pages_exist() -> None:
    """`align.policy.reward.path` in a page ends in a setting that docs/reference/settings.md has."""
    reference = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `(\w+)`", reference, flags=re.MULTILINE))
    dotted = re.compile(rf"`((?:{'|'.join((*STAGES, 'base', 'numerics', 'placement'))})\.[\w.*]+)`")
    for page in (path for path in PAGES if path.name not in ("LOG.md", "CHANGELOG.md")):
        named = dotted.findall(page.read_text(encoding="utf-8"))
        deep = [name for name in named if name.count(".") > 1 or name.partition(".")[0] not in ENTRIES]
        odd = [name for name in deep if name.rpartition(".")[2] not in known | {"md"}]
        assert odd == [], name_of(page)


PIPELINES = re.findall(
    r"^### (.+?)\n(.*?)(?=^### |\Z)",
    (ROOT / "docs/guides/graph.md").read_text("utf-8").partition("## Pipelines")[2].partition("\n## ")[0],
    flags=re.DOTALL | re.MULTILINE,
)
EMPTY: dict[str, Any] = {name: {} for name in ("numerics", "placement", "validate", "compare", *ENTRIES)}
GIVEN = {"tokenizer": {"name": "from", "path": "models/small"}, "context": 1024}  # where an example does not set it


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pipelines of the guide to the graph; one that begins with `align` adds to the one before."""
    earlier: dict[str, Any] = {}
    for title, text in PIPELINES:
        for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
            content = YAML(typ="safe", pure=True).load(block)
            earlier = {**earlier, **content} if "align" in content else content
            yield title, earlier


@pytest.mark.parametrize(
    ("title", "sections"), list(examples()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_pipelines_of_the_graph_guide_are_valid(title: str, sections: dict[str, Any]) -> None:
    source = {"kind": "files", "licence": "MIT", "format": "jsonl"}
    named = [{**source, "name": table, "path": f"{table}.jsonl", "table": table} for table in tables.TABLES]
    params = {"base": {"seed": 1}, "ingest": {"sources": named}, "tokenize": GIVEN, **EMPTY, **sections}
    check(params, title)
