"""The text of a new project's `params.yaml`: at most `MAX_LINES` lines, with a comment where a person decides."""

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.common.settings import STAGES

SECTIONS = ("base", "numerics", "placement", *STAGES[:-2], "evaluations", *STAGES[-2:])
MAX_LINES = 40
WIDTH = 118
INDENT = 4
LISTED_ITEMS = 2  # of a list with a line for each item; longer ones are wrapped
HEADER = "# {title} (`bessemer params` prints every setting, `--markdown` describes them)"
COMMENTS = {
    "numerics": "how results are computed, where that changes their bytes",
    "placement": "where they are computed; not part of a model's identity",
    "ingest": "your data; `licence: unknown` is listed in the report until you name it",
    "pretrain": "base models",
    "finetune": "raise `steps` for more epochs",
    "reward": "`train` is the reward of alignment, `judge` measures what alignment gained",
    "align": "the policy",
    "quantize": "what the endpoint loads",
    "evaluate": "the models of the scorecard",
    "evaluations": "what is measured; empty: all that applies",
    "compare": "`package` refuses a model that fails a gate",
}


def render(title: str, sections: Mapping[str, Any]) -> str:
    """Return the text of `params.yaml` with these sections; the others are empty."""
    lines = [HEADER.format(title=title)]
    empty = []
    for name in SECTIONS:
        content = sections.get(name, {})
        if not content and name not in ("base", "numerics"):
            empty.append(f"{name}: {{}}")
            continue
        lines += _section(name, content)
    lines += empty
    return "\n".join(lines) + "\n"


def _section(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    comment = f" # {COMMENTS[name]}" if name in COMMENTS else ""
    whole = f"{name}: {flow(content)}"
    if len(whole) + len(comment) <= WIDTH:
        yield whole + comment
        return
    if all(isinstance(entry, Mapping) and len(entry) == 1 for entry in content.values()):
        yield from _wrap(whole, INDENT)
        return
    yield f"{name}:{comment}"
    anchors: dict[str, str] = {}  # entry that later ones repeat: its anchor
    for key, value in content.items():
        like = next((other for other in anchors if _differs_little(content[other], value)), None)
        later = list(content)[list(content).index(key) + 1 :]
        if isinstance(value, list) and len(value) <= LISTED_ITEMS:
            yield f"  {key}:"
            for item in value:
                yield from _wrap(f"    - {flow(item)}", 7)
        elif like is not None:
            changed = {setting: value[setting] for setting in value if value[setting] != content[like][setting]}
            yield f"  {key}: {{<<: *{anchors[like]}, {flow(changed).removeprefix('{')}"
        elif any(_differs_little(content[other], value) for other in later):
            anchors[key] = f"{name}-{key}" if anchors else name
            yield from _wrap(f"  {key}: &{anchors[key]} {flow(value)}", INDENT)
        else:
            yield from _wrap(f"  {key}: {flow(value)}", INDENT)


def _differs_little(first: Any, second: Any) -> bool:
    """Return whether two entries have the same keys, and most of their values are equal."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping) or first.keys() != second.keys():
        return False
    return 3 * sum(1 for key in first if first[key] != second[key]) < len(first)


def _wrap(text: str, indent: int) -> Iterator[str]:
    """Break a line of flow style at commas."""
    while len(text) > WIDTH:
        end = text.rfind(", ", 0, WIDTH) + 1
        if not end:
            break
        yield text[:end]
        text = " " * indent + text[end:].lstrip()
    yield text


def flow(value: Any) -> str:
    """Return a value in YAML's flow style on one line."""
    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = True
    writer.width = 100_000
    writer.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    writer.dump(value, stream)
    text = stream.getvalue().strip().removesuffix("\n...").strip()
    return re.sub(r"\b(\d+)e-0?(\d+)\b", r"\1.0e-\2", text)  # 5e-05: YAML 1.1 reads a text in it
