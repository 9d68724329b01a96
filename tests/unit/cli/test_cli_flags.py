"""Flags from settings: over the environment, over the file, over the default."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from sandkeeper.cli.flags import settings_command


class Part(BaseModel):
    size: int = Field(1, ge=1, description="How big.")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TEST_FLAGS_", env_nested_delimiter="__", extra="forbid")

    name: str = Field("default", description="What it is called.")
    quiet: bool = False
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    where: Path | None = None
    part: Part = Part()


def run(*arguments: str) -> tuple[Result, Settings | None]:
    seen: list[Settings] = []
    result = CliRunner().invoke(settings_command("test", Settings, seen.append, help="Help."), arguments)
    return result, seen[0] if seen else None


def test_defaults() -> None:
    assert run()[1] == Settings()


def test_every_kind_of_flag() -> None:
    arguments = ["--name=n", "--quiet", "--kind=b", "--names=x,,y", "--where=/w", "--part-size=3"]
    assert run(*arguments)[1] == Settings(
        name="n", quiet=True, kind="b", names=("x", "y"), where=Path("/w"), part=Part(size=3)
    )


def test_a_flag_goes_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_FLAGS_NAME", "environment")
    monkeypatch.setenv("TEST_FLAGS_QUIET", "true")
    monkeypatch.setenv("TEST_FLAGS_PART__SIZE", "5")
    found = run("--name", "flag", "--no-quiet")[1]
    assert found is not None
    assert (found.name, found.quiet, found.part.size) == ("flag", False, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--part-size", "0"], "part.size (TEST_FLAGS_PART__SIZE)"),
        (["--part-size", "many"], "part.size (TEST_FLAGS_PART__SIZE)"),
        (["--kind", "c"], "--kind"),
        (["--nosuch"], "--nosuch"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_it(arguments: list[str], named: str) -> None:
    result, made = run(*arguments)
    assert (result.exit_code, made) == (2, None)
    assert named in result.output


def test_help_names_default_and_variable() -> None:
    result = CliRunner().invoke(settings_command("test", Settings, print, help="Help."), ["--help"])
    for text in ("What it is called.", "[default: default]", "TEST_FLAGS_NAME", "TEST_FLAGS_PART__SIZE"):
        assert text in result.output


def test_the_command_is_a_click_command() -> None:
    assert isinstance(settings_command("test", Settings, print, help="Help."), click.Command)
