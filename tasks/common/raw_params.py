"""Read `params.yaml` without checks and defaults; not part of a recipe, because the settings are recorded."""

from pathlib import Path
from typing import Any

from tasks.common.settings import STAGES, SettingsError


def read_params(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """Return the raw contents of `params.yaml`; raise SettingsError if it is missing or not a YAML mapping."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.exists():
        raise SettingsError(
            f"{path} is missing: change to the project's folder, or create it with `bessemer profile default`."
        )
    try:
        params = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(params, dict):
        raise SettingsError(
            f"{path} must hold one section per stage ({', '.join(STAGES)}) and base, numerics and placement."
        )
    return params
