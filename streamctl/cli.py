"""The console command: registers every command and is the only place that turns errors to exits."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from importlib.metadata import version
from typing import Any

import typer
import typer.core

from streamctl.distributed import is_main, joined, leave
from streamctl.errors import TYPED, StreamctlError

# What --help puts together, in the order of work. A command is the module of its name below
# streamctl.commands; those of `data` begin with data_.
DATA = "Data"
GROUPS = {
    DATA: ("prepare", "fetch", "synth", "doctor", "export"),
    "Train": ("tokenize", "pretrain", "annotate", "sft", "rl", "run", "demo"),
    "Evaluate": ("baseline", "rerank", "eval", "reproduce"),
    "Use": ("refit", "update", "recommend", "serve", "doctor"),
}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"streamctl {version('streamctl')}")
        raise typer.Exit


class _Commands(typer.core.TyperGroup):
    """Remembers what was typed, and lists groups before commands, so that data comes first."""

    def main(self, args: Any = None, *others: Any, **options: Any) -> Any:
        token = TYPED.set(tuple(sys.argv[1:] if args is None else args))
        try:
            return super().main(args, *others, **options)
        finally:
            TYPED.reset(token)

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name != "data")


def build_app() -> typer.Typer:
    """The Typer app with every command; each module defines one function named `command`."""
    app = typer.Typer(
        name="streamctl",
        cls=_Commands,
        help="Recommends the next item, and shows why: from a raw log to a served answer.\n\n"
        "Example: `streamctl data prepare sales.csv --run runs/mine`, then "
        "`streamctl run --run runs/mine`, `streamctl serve --run runs/mine`.",
        epilog="Start with `streamctl demo`, or `streamctl data prepare SOURCE --run runs/NAME`.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    data = typer.Typer(
        help="Prepare, fetch, make, inspect and export data.\n\n"
        "Example: `streamctl data doctor sales.csv`, then `streamctl data prepare sales.csv "
        "--run runs/mine`.",
        no_args_is_help=True,
    )
    app.add_typer(data, name="data", rich_help_panel=DATA)
    for panel, names in GROUPS.items():
        for name in names:
            module = f"data_{name}" if panel == DATA else name
            function = importlib.import_module(f"streamctl.commands.{module}").command
            if panel == DATA:
                data.command(name=name)(function)
            else:
                app.command(name=name, rich_help_panel=panel)(function)

    @app.callback()
    def main_options(
        debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails."),
        version: bool = typer.Option(
            False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        if debug:
            os.environ["STREAMCTL_DEBUG"] = "1"

    return app


def main() -> None:
    """Entry point: exit code 0 success, 1 an expected failure, 2 usage, 130 interrupted.

    In a job of several processes the first one speaks.
    """
    if not is_main():
        _silence()
    for stream in (sys.stdout, sys.stderr):  # a terminal without the characters gets their codes
        stream.reconfigure(errors="backslashreplace")
    # OpenMP's threads spin while they wait. Beside another busy process that costs most of the
    # machine (training was 8 times slower), so that they sleep here; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A server does not wait for Numba. One answer is there before compiled code is read.
    if sys.argv[1:2] == ["serve"]:
        os.environ.setdefault("STREAMCTL_COMPILE", "cached")
    elif sys.argv[1:2] == ["recommend"] and not any(w.startswith("--input") for w in sys.argv):
        os.environ.setdefault("STREAMCTL_COMPILE", "never")
    # An end that is asked for is an interruption: cleaned up after, and told of in one line.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        build_app()()
    except SystemExit as error:
        if error.code == 130:  # Typer has caught the interrupt, and says nothing
            _report(KeyboardInterrupt())
        if not error.code:
            leave()
        raise
    except (StreamctlError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("STREAMCTL_DEBUG"):
            raise
        sys.exit(_report(error))


def _silence() -> None:
    from streamctl.progress import console

    console.quiet = True
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def _report(error: BaseException) -> int:
    from streamctl.progress import plain_console

    alike = not is_main() and not joined()  # the first process fails in the same way and says so
    console = plain_console(stderr=True, soft_wrap=True, quiet=alike)
    if isinstance(error, KeyboardInterrupt):
        console.print("interrupted: the same command continues", style="yellow")
        return 130
    if isinstance(error, StreamctlError):
        console.print(f"error: {error}", style="red")
        return error.exit_code
    where = f"{error.filename}: " if getattr(error, "filename", None) else ""
    text = f"error: {where}{error.strerror or error}"
    console.print(text, style="red")
    return 1
