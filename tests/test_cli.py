"""The command itself: overview, versions, exit codes, and mistakes in one line."""

import subprocess
import sys

import pytest

import gaitfast
from gaitfast import cli
from gaitfast.config import UserError
from gaitfast.kernels import BackendError


def test_overview_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name, (_, purpose) in cli.COMMANDS.items():
        assert f"  {name} " in text and purpose in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"gaitfast {gaitfast.__version__}"


@pytest.mark.parametrize("arguments", [[], ["walk"], ["rank"], ["rank", "--dataset"]])
def test_wrong_words_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: gaitfast" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: gaitfast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.yaml: no such file"), 2, "gaitfast: error: a.yaml: no such file\n"),
        (BackendError("no such backend"), 2, "gaitfast: error: no such backend\n"),
        (KeyboardInterrupt(), 130, "gaitfast: interrupted\n"),
    ],
)
def test_a_mistake_is_one_line(error, code, line, capsys):
    with pytest.raises(SystemExit) as stop, cli.user_errors():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.user_errors():
        raise ZeroDivisionError


def test_importing_the_package_is_cheap_and_settles_the_threads():
    code = (
        "import os, sys, gaitfast;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == "10000"
