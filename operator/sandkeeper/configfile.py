"""Settings from flags over environment over a YAML file: the same for every command."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

FIELD = "config_file"
"""The setting that names the file: given as a flag or in the environment."""


def sources(
    settings: type[BaseSettings], flags: PydanticBaseSettingsSource, environment: PydanticBaseSettingsSource
) -> tuple[PydanticBaseSettingsSource, ...]:
    """For `settings_customise_sources`. Raises ValueError naming a file that cannot be read or is no mapping."""
    given = flags.init_kwargs if isinstance(flags, InitSettingsSource) else {}
    path = given.get(FIELD) or environment().get(FIELD)
    if not path:
        return flags, environment
    return flags, environment, InitSettingsSource(settings, init_kwargs=_read(Path(path)))


def _read(path: Path) -> dict[str, object]:
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{FIELD} must be a readable file: {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{FIELD} must be YAML: {path}: {str(error).splitlines()[0]}") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ValueError(f"{FIELD} must hold a mapping of settings: {path}")
    return document
