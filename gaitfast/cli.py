"""The `gaitfast` command. A subcommand lives in the module that does its work and is imported when asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

import gaitfast

COMMANDS = {
    "walkers": ("gaitfast.data.walkers", "generate synthetic walking people"),
    "prepare": ("gaitfast.data.prepare", "pack silhouettes into a dataset, or verify one"),
    "train-autoencoder": ("gaitfast.train_autoencoder", "train the silhouette autoencoder"),
    "pretrain": ("gaitfast.pretrain", "pretrain a backbone as a single process (or: deepspeed gaitfast/pretrain.py)"),
    "transfer": (
        "gaitfast.transfer",
        "train a recognizer from a backbone as a single process (or: deepspeed gaitfast/transfer.py)",
    ),
    "status": ("gaitfast.status", "what a run is doing: step, speed, time to go, last checkpoint, health"),
    "rank": ("gaitfast.rank", "embed a dataset and rank it under a protocol"),
    "export": ("gaitfast.export", "a model as OpenGait checkpoint, safetensors or ONNX graph"),
    "report": ("gaitfast.report.page", "draw the page of a run"),
    "doctor": ("gaitfast.doctor", "what is installed, which backend each op will use, what is missing"),
}


def _mistakes() -> tuple[type[Exception], ...]:
    """The classes that mean a user's mistake, looked up late: the doctor must run where a dependency is missing."""
    from gaitfast.config import UserError

    kernels = sys.modules.get("gaitfast.kernels")
    return (UserError, kernels.BackendError) if kernels else (UserError,)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake ends the process with one line and exit code 2, Ctrl-C with 130, a bug with a traceback."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if not isinstance(error, _mistakes()):
            raise
        sys.stdout.flush()
        print(f"gaitfast: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("gaitfast: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "commands:\n" + "\n".join(lines) + "\n\ngaitfast COMMAND --help tells more."


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    top = argparse.ArgumentParser(
        prog="gaitfast",
        description="Diffusion pretraining of gait-recognition backbones.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="gaitfast COMMAND ...",
    )
    top.add_argument("--version", action="version", version=f"gaitfast {gaitfast.__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    command = top.parse_args(argv[:1]).command
    name, text = COMMANDS[command]
    with user_errors():
        module = importlib.import_module(name)
        parser = argparse.ArgumentParser(
            prog=f"gaitfast {command}", description=(module.__doc__ or text).split("\n\n")[0]
        )
        module.configure(parser)
        sys.exit(module.main(parser.parse_args(argv[1:])))


if __name__ == "__main__":
    main()
