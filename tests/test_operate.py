"""src/serving/operate.py and src/serving/draining.py where there is no server, or none that answers."""

import os
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import pytest

from src.serving.client import Refused, call
from src.serving.operate import build_parser, main
from tests.conftest import ROOT, TIMEOUT, run_script
from tests.file_server import serve

COMMANDS = (["ready", "--timeout", "60"], ["status"], ["scale", "--workers", "2"], ["drain"])
# An alarm at any moment while requests are prepared; prints how many of them were not heard.
ALARMS = """
import random, signal
from src.serving.client import opener_for

class Alarm(BaseException):
    pass

def ring(number, frame):
    global rung
    rung = True
    raise Alarm

signal.signal(signal.SIGALRM, ring)
unheard = 0
for _ in range(2000):
    rung = False
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 1e-3))
        while not rung:
            opener_for("http://127.0.0.1:1/ping")
        unheard += 1
    except Alarm:
        pass
print(unheard)
"""
WRITE = "from pathlib import Path; from src.serving.draining import write_empty_archive as w; w(Path({!r}), 'a')"


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_control_c_ends_a_command_without_a_word(arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT)
        command = [sys.executable, "-m", "src.serving.operate", *arguments]
        command += ["--management", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        if arguments[0] in ("scale", "drain"):
            (tmp_path / "model-store").mkdir()
            command += ["--store", str(tmp_path / "model-store")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # These tests may run in a background job, which ignores SIGINT and hands that on.
        heeded = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
        with subprocess.Popen(command, cwd=ROOT, **pipes, **heeded) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, *said) == (130, "", "")


def test_a_signal_is_heard_while_a_request_is_prepared():
    """Which urllib's own build_opener may not let happen."""
    done = run_script(ROOT, sys.executable, "-c", ALARMS)
    assert done.stdout == "0\n", done.stdout + done.stderr


@pytest.mark.parametrize("words", [["deploy", "x.mar", "--watch"], ["ready", "--timeout"], ["drain", "--timeout"]])
@pytest.mark.parametrize("value", ["-5", "nan", "inf"])
def test_a_time_that_cannot_be_is_refused(words, value, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*words, value])
    assert f"argument {words[-1]}: {value} is no time to wait; give a number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("canary", "least"), [("1", 50), ("5,25", 10), ("50", 5), ("50,96", 13)])
def test_a_canary_whose_versions_would_not_both_have_a_turn_is_refused(canary, least, capsys, tmp_path):
    words = ["deploy", "nothing.mar", f"--store={tmp_path}/model-store", "--canary", canary, "--watch"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, str(least - 1)])
    assert f"with this --canary both have had a turn after {least}: give that" in capsys.readouterr().err
    assert main([*words, str(least)]) == 1
    assert "nothing.mar does not exist" in capsys.readouterr().err


def test_a_drain_that_cannot_write_leaves_nothing_for_the_next_one(tmp_path):
    """The limit on a file's size ends the write, as a full disk does."""
    code = WRITE.format(str(tmp_path))
    done = run_script(ROOT, "bash", "-c", 'ulimit -f 0; "$@"', "-", sys.executable, "-c", code)
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert os.listdir(tmp_path) == []
    assert run_script(ROOT, sys.executable, "-c", code).returncode == 0
    assert os.listdir(tmp_path) == ["a-draining.mar"]


def test_a_server_that_says_nothing_is_named():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/ping"
        with pytest.raises(TimeoutError, match=f"GET {url}: no answer within 0.2 s"):
            call(url, timeout=0.2)


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_is_not_followed(status):
    class Elsewhere(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "/there")
            self.end_headers()

    with serve({}, Elsewhere) as server, pytest.raises(Refused, match=f"answers {status}") as refused:
        call(f"{server.url}/here", b"{}")
    assert refused.value.status == status


def test_an_address_that_is_none_of_a_server_is_refused(tmp_path):
    with pytest.raises(ConnectionError, match="unknown url type: file"):
        call(f"file://{tmp_path}")
