"""A runtime and a conmon that misbehave on command: a script before each of the real programs."""

from __future__ import annotations

import shutil
from pathlib import Path

_SCRIPT = """#!/bin/sh
control={control}
real={real}
command={command}
if test "$command" = runtime; then
    for word; do
        case $word in
            -*) ;;
            *) command=$word; break ;;
        esac
    done
fi
mode=
read -r mode 2>/dev/null <"$control/$command"
case $mode in
    once-*)
        if mv "$control/$command" "$control/$command.$$" 2>/dev/null; then mode=${{mode#once-}}; else mode=; fi ;;
esac
case $mode in
    fail) echo "no luck today" >&2; exit 1 ;;
    hang) exec sleep 86400 ;;
    garbage) head -c 300000 /dev/urandom; head -c 300000 /dev/urandom >&2; exit 1 ;;
    noisy) head -c 30000 /dev/urandom; head -c 30000 /dev/urandom >&2 ;;
    endless) exec yes ;;
    killed) kill -9 $$ ;;
    lies) "$real" "$@"; exit 1 ;;
    idle) exit 0 ;;
    dies)
        pidfile=
        for word; do
            test "$pidfile" = next && pidfile=$word && break
            test "$word" = --conmon-pidfile && pidfile=next
        done
        "$real" "$@"
        kill -9 "$(cat "$pidfile")"
        exit 0 ;;
    says-*) printf '%s\\n' "${{mode#says-}}" >"/proc/self/fd/$_OCI_SYNCPIPE"; exit 0 ;;
    babbles) head -c 300000 /dev/urandom >"/proc/self/fd/$_OCI_SYNCPIPE"; exit 0 ;;
esac
exec "$real" "$@"
"""


class BrokenTools:
    """runtime, conmon: the scripts' paths. Both do as the real programs until `set` says otherwise."""

    def __init__(self, folder: Path, runtime: str) -> None:
        self._control = folder / "control"
        self._control.mkdir(parents=True)
        self.runtime = self._script(folder / "broken-runtime", runtime, "runtime")
        self.conmon = self._script(folder / "broken-conmon", "conmon", "conmon")

    def _script(self, path: Path, program: str, command: str) -> Path:
        real = shutil.which(program)
        if real is None:
            raise FileNotFoundError(program)
        path.write_text(_SCRIPT.format(control=self._control, real=real, command=command))
        path.chmod(0o755)
        return path

    def set(self, command: str, mode: str) -> None:
        """command: the runtime's (`create`, `start`, ...) or `conmon`.

        mode: of the script above; once-MODE: at the next call only.
        """
        fresh = self._control / f"{command}.new"
        fresh.write_text(f"{mode}\n")
        fresh.rename(self._control / command)

    def met(self, command: str) -> bool:
        """What was to happen once has happened."""
        return not (self._control / command).exists()

    def mend(self) -> None:
        for each in self._control.iterdir():
            each.unlink()
