"""Command lines: flags and config overrides in, one sentence and an exit code out when something is wrong."""

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging as absl_logging

from moe.checkpoint import CheckpointError
from moe.compiler import TooLarge
from moe.routers import ROUTERS

# A run that has been told to stop and has saved: the same command goes on (EX_TEMPFAIL of sysexits.h).
USAGE, FAILURE, STOPPED, INTERRUPTED = 2, 1, 75, 130  # and moe.watchdog.STUCK


class UsageError(Exception):
    """The command can't be run as given; the message is one sentence with the remedy. Exit code 2."""


class Failure(Exception):
    """The command was right, but something it needs isn't there. Exit code 1."""


class Stopped(Exception):
    """The run was told to stop, and has saved all that it needs to go on. Exit code 75."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a ValueError from reading and checking the command's input into a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help.")


def make_parser(description: str, default_config: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with the configs beside `default_config` and the routers."""
    configs = sorted(str(path) for path in Path(default_config).parent.glob("*.py"))
    epilog = (
        "Any field of the config can be set: --config.router.name=sparse_topk --config.mesh.expert=4\n\n"
        f"configs: {', '.join(configs)}\nrouters: {', '.join(ROUTERS)}"
    )
    return _Parser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the config overrides as "path=value". Raises UsageError for anything else."""
    overrides: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith(("--config.", "-config.")):
            rest.append(word)
            continue
        assignment = word.split("config.", 1)[1]
        if "=" not in assignment:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UsageError(f"{word} needs a value: {word}=….")
            assignment = f"{assignment}={value}"
        overrides.append(assignment)
    return parser.parse_args(rest), overrides


def _unraisable(what: Any) -> None:
    """As Python, but without what TensorStore's threads say of reads and writes that nobody waits for any more."""
    if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(what)


def _end(code: int) -> None:
    """Ends the process at once: XLA goes on with a compilation that was interrupted, and the rest of an exit would take
    away what it uses."""
    for process in multiprocessing.active_children():
        process.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a program's `main` on the command line; a known error ends it with one sentence and no traceback."""
    # What Orbax and tfds say is about their own workings, or is raised as well.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _unraisable
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        code, message = USAGE, str(error)
    except (Failure, CheckpointError) as error:
        code, message = FAILURE, str(error)
    except TooLarge as error:
        code, message = FAILURE, f"{error}: plan.py says beforehand what fits, and what would help."
    except Stopped as stop:
        code, message = STOPPED, str(stop)
    except OSError as error:
        code, message = FAILURE, f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; the same command goes on from what has been saved."
        # After the threads of Python, which may still be saving.
        atexit.register(_end, code)
    else:
        sys.exit(0)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)
