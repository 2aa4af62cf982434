"""The shell: names → callables. Only this floor knows strings from outside, and only it prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cpd.errors import (
    ArtefactError,
    CPDError,
    DataError,
    Interrupted,
    NonFiniteLoss,
    OutOfMemory,
    OutputError,
    UnreachableTarget,
    VerifyError,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["CODES", "main"]

# The first kind that fits; 1 is an error that nobody expected, with its traceback.
CODES: tuple[tuple[type[BaseException], int], ...] = (
    (KeyboardInterrupt, 130),
    (Interrupted, 143),
    (UnreachableTarget, 3),
    (VerifyError, 4),
    (OutputError, 5),
    (ArtefactError, 6),
    (NonFiniteLoss, 7),
    (OutOfMemory, 8),
    (DataError, 9),
    (CPDError, 2),
)


def main(words: list[str] | None = None) -> int:
    """Run a command; return its exit code, see ``CODES``: 0, or what kind of error it was.

    ``--debug`` anywhere shows the traceback of an error.
    """
    words = list(sys.argv[1:] if words is None else words)
    debug, grouped = "--debug" in words, _grouped()
    words = [word for word in words if word != "--debug"]
    try:
        from rich.console import Console
        from rich.text import Text

        _run(words, Console())
    except CPDError as error:
        if debug:
            raise
        shown = Text(f"{type(error).__name__}: ", style="bold red")
        Console(stderr=True, soft_wrap=True).print(shown + Text(str(error)))
        return next(code for kind, code in CODES if isinstance(error, kind))
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("cpd"):
            raise
        sys.stderr.write(f"the package {error.name!r} is missing: pip install 'cpd[all]'\n")
        return 2
    except KeyboardInterrupt as error:
        again = "the same command" if words[:1] == ["study"] else "--resume"
        said = str(error) or f"interrupted; {again} goes on from the last checkpoint"
        sys.stderr.write(f"{said}\n")
        return 130
    finally:
        if _grouped() and not grouped:
            from cpd.distill.spread import leave

            leave()
    return 0


def _grouped() -> bool:
    """Whether this process belongs to a group; PyTorch is not loaded for the answer."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run(words: list[str], console: Any) -> None:
    from cpd.cli.commands import COMMANDS, Shell

    shell = Shell(console)
    if words[:1] == ["compress"] and "--help" not in words and "-h" not in words:
        from cpd.cli.flags import settings

        shell.compress(settings(words[1:]))
        return
    found = _parser().parse_args(words).as_dict()
    command = found.pop("subcommand")
    assert command in COMMANDS
    getattr(shell, command)(**found[command])


def _parser() -> ArgumentParser:
    """The parser of every command."""
    from jsonargparse import ArgumentParser

    from cpd import __version__
    from cpd.cli.commands import COMMANDS, Shell
    from cpd.cli.flags import describe
    from cpd.cli.flags import parser as compress_parser

    about = "Comb, Prune, Distill: make a trained network smaller, and prove it."
    made = ArgumentParser(prog="cpd", description=about, version=__version__)
    commands = made.add_subcommands(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        method = getattr(Shell, name)
        told = (method.__doc__ or "").strip().splitlines()[0]
        each = ArgumentParser(description=told)
        each.add_method_arguments(Shell, name, as_positional=True, sub_configs=False)
        describe(each, method.__doc__ or "")
        commands.add_subcommand(name, each, help=told)
    told = "Run a recipe: train, comb, prune, cut, prove, recover, measure."
    commands.add_subcommand("compress", compress_parser(), help=told)
    return made
