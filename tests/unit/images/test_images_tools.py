"""Running tools: environment, deadline, last words without secrets."""

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from sandkeeper.shim.engines.oci.images import tools


def test_only_what_the_tools_need_reaches_them() -> None:
    ours = {
        "PATH": "/bin",
        "HOME": "/root",
        "AWS_SECRET_ACCESS_KEY": "x",
        "LD_PRELOAD": "/x",
        "https_proxy": "p",
    }
    assert tools.environment(ours, {"TMPDIR": "/t"}) == {
        "PATH": "/bin",
        "HOME": "/root",
        "https_proxy": "p",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": "/t",
    }


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("", ""),
        (
            'time="2026-01-01T00:00:00Z" level=fatal msg="Error parsing \\"x\\": no"\n',
            'Error parsing "x": no',
        ),
        ('time="x" level=fatal msg="it"\ntime="x" level=warning msg="later"\n', "it"),
        ("one\n   \u2a2f create bundle: no\n", "create bundle: no"),
        ("x" * 5000, "x" * (tools.MAX_MESSAGE - 3) + "..."),
    ],
)
def test_the_last_words_are_found(stderr: str, words: str) -> None:
    assert tools.last_words(stderr) == words


@pytest.mark.parametrize(
    "text",
    [
        "Get https://user:hunter22@host/v2/: no",
        "Get https://host/token?account=user&password=hunter22: no",
        "Authorization: Bearer hunter22hunter22",
        "authorization: basic hunter22==",
        "password=hunter22, next",
        '{"token":"hunter22"}',
    ],
)
def test_secrets_are_taken_out(text: str) -> None:
    assert "hunter22" not in tools.without_secrets(text)


def test_harmless_words_stay() -> None:
    text = 'reading manifest 1 in host:5000/a/none: Get "https://host:5000/v2/": connection refused'
    assert tools.without_secrets(text) == text


async def test_output_is_returned_and_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELL_TALE", "x")
    program = "import os; print(os.getcwd(), 'TELL_TALE' in os.environ, os.listdir('/proc/self/fd'))"
    null = os.open("/dev/null", os.O_RDONLY)
    opened = os.dup2(null, 77, inheritable=True)
    os.close(null)
    try:
        out = await tools.run([sys.executable, "-c", program], {})
    finally:
        os.close(opened)
    assert out.decode().split()[:2] == ["/", "False"]
    assert f"'{opened}'" not in out.decode()


async def test_failure_has_the_tools_words() -> None:
    with pytest.raises(tools.ToolError, match=r"^so it is$"):
        await tools.run([sys.executable, "-c", "import sys; sys.exit('so it is')"], {})
    with pytest.raises(tools.ToolError, match="status 7"):
        await tools.run([sys.executable, "-c", "import sys; sys.exit(7)"], {})


async def test_a_missing_tool_is_an_error() -> None:
    with pytest.raises(tools.ToolError, match="no-such-tool"):
        await tools.run(["no-such-tool"], {})


async def test_a_deadline_kills_the_tool(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"import os,time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    task = asyncio.create_task(tools.run([sys.executable, "-c", program], {}))
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
