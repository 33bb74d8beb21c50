"""Rules between settings and the tokenizers that the user brings: their files, end tokens and chat templates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.common import model_folder
from tasks.common.model_graph import Params, lookup
from tasks.common.text.templates import CONTROL_TOKENS, NAMED
from tasks.rules.model_kinds import ModelKinds
from tasks.rules.models import entries

CHAT_STAGES = ("finetune", "align", "prune")  # which encode conversations of a causal model
TEMPLATE_STAGES = (*CHAT_STAGES, "reward", "quantize", "evaluate")


def check_user_tokenizers(params: Params) -> Iterator[str]:
    """Report a tokenizer without an end token, and chat templates that are missing or unknown."""
    given = lookup(params, "tokenize.tokenizer.name") == "from"
    path = lookup(params, "tokenize.tokenizer.path") if given else None
    models = {str(lookup(entry, name)) for _, _, entry in entries(params) for name in ("model", "model.path")}
    if isinstance(path, str) and Path(path).is_dir() and path not in models:  # those of models are reported with them
        for problem in model_folder.tokenizer_problems(model_folder.tokenizer_folder(Path(path))):
            yield f"tokenize.tokenizer.path: {path} cannot be used: {problem}"
    kinds = ModelKinds(params)
    for stage, where, entry in entries(params, *TEMPLATE_STAGES):
        for problem in _template_problems(stage, entry, kinds):
            yield f"{where}.chat_template: {problem}"


def _template_problems(stage: str, entry: Any, kinds: ModelKinds) -> Iterator[str]:
    """Report the template of an entry whose model descends from a folder of the user's."""
    model, name = lookup(entry, "model"), lookup(entry, "chat_template")
    root, chain = kinds.root(model), kinds.chain(model)
    folder = model_folder.tokenizer_folder(Path(root))
    if not root or not (folder / "tokenizer.json").is_file():
        return
    own, earlier = read_templates(folder), [lookup(one.settings, "chat_template") for one in chain]
    is_chat = lookup(entry, "task.name") in (None, "chat") and kinds.gives_replies(model)
    if isinstance(name, str) and name not in own:
        if name not in NAMED:
            yield f"found {name!r}, but it should be one of {', '.join([*filter(None, own), *NAMED])}"
        elif lacking := sorted(set(CONTROL_TOKENS[name]) - _vocabulary(folder)):
            yield (
                f"found {name!r}, but the tokenizer in {root} lacks {', '.join(lacking)}: use a template of the "
                "model's own family, or plain, which needs only an end token"
            )
    elif name is None and not chain and own and not {"", "default"} & own.keys():
        yield f"found none, but {root} has several chat templates: set it to one of {', '.join(own)}"
    elif name is None and not own and not any(earlier) and stage in CHAT_STAGES and is_chat:
        yield f"found none, and {root} has no chat template: set it to one of {', '.join(NAMED)}"


def read_templates(folder: Path) -> dict[str, str]:
    """Return a folder's chat templates by name; one without a name has the name ""."""
    listed = model_folder.read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(listed, str):
        found = {"": listed}
    else:
        named = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
        found = {str(one.get("name")): str(one.get("template")) for one in named}
    files = {"": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    return found | {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}


def _vocabulary(folder: Path) -> set[str]:
    """Return the tokens of a tokenizer.json."""
    content = model_folder.read_json(folder / "tokenizer.json")
    vocabulary = lookup(content, "model.vocab") or ()
    pieces = vocabulary if isinstance(vocabulary, Mapping) else (piece[0] for piece in vocabulary)
    return {*map(str, pieces), *(str(token["content"]) for token in content.get("added_tokens", ()))}
