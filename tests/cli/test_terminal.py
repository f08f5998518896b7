"""What a terminal and a pipe get: colours where they are wanted, and no complaint where nobody reads."""

import os
import pty
import subprocess
import sys

import pytest

pytest.importorskip("tyro", reason="the command line needs tyro")
pytest.importorskip("rich", reason="the command line needs rich")
COMMAND = [sys.executable, "-m", "flax_vae"]


def shown(*args, stderr_too=True, **variables):
    """Runs a command in a terminal; returns what the terminal gets, and what a file does that gets the errors."""
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | variables
    errors = theirs if stderr_too else subprocess.PIPE
    process = subprocess.Popen([*COMMAND, *args], stdout=theirs, stderr=errors, env=env)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 1 << 16):
            text += part
    except OSError:  # Linux ends a terminal so
        pass
    os.close(ours)
    return text, process.communicate()[1]


@pytest.mark.parametrize("args", [["--help"], ["info"]], ids=["help", "usage error"])
@pytest.mark.parametrize(
    ("variables", "has_colours"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
    ids=["terminal", "NO_COLOR", "TERM=dumb", "empty NO_COLOR"],
)
def test_colours_are_for_terminals_and_for_who_wants_them(args, variables, has_colours):
    text, _ = shown(*args, **variables)
    assert b"flax-vae" in text
    assert (b"\x1b[" in text) == has_colours


def test_usage_errors_in_a_file_have_no_colours():
    text, errors = shown("info", stderr_too=False)
    assert b"flax-vae info --help" in errors
    assert b"\x1b[" not in text + errors


@pytest.mark.parametrize(
    ("args", "closed", "code"),
    [
        (["--help"], "stdout", 141),
        (["info", "--help"], "stdout", 141),
        (["info", "default"], "stdout", 141),
        (["info"], "stderr", 141),
        (["info", "no such"], "stderr", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_reader_that_has_gone_ends_the_command_in_silence(args, closed, code):
    read, write = os.pipe()
    os.close(read)
    out, err = (write if closed == name else subprocess.PIPE for name in ("stdout", "stderr"))
    with subprocess.Popen([*COMMAND, *args], stdout=out, stderr=err) as process:
        os.close(write)
        said = process.communicate()
    assert process.returncode == code
    assert not any(said)


def test_a_broken_pipe_elsewhere_is_an_error(run, monkeypatch):
    def broken(args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("flax_vae.cli.call", broken)
    monkeypatch.setattr("flax_vae.cli.is_unread", lambda: False)
    code, _, err = run()
    assert code == 2
    assert "Broken pipe" in err
