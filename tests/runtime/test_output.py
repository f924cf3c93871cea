"""Printed text: without secrets, in any encoding, and to closed streams."""

import os
import subprocess
import sys

import pytest

from spin.runtime import output
from tests.games import ROOT

START = "from spin.runtime import output; import sys; output.open_streams(); "


def run_code(code: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess:
    command = f'{sys.executable} -c "$CODE" {redirect}'
    settings = {**os.environ, "CODE": START + code, **env}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=settings, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"a ? ?"), ("latin-1", b"a \xe9 ?"), ("utf-8", "a é ┃".encode())]
)
def test_characters_missing_from_encoding(encoding, expected):
    result = run_code("print('a \\u00e9 \\u2503')", PYTHONIOENCODING=encoding)
    assert result.stdout.strip() == expected and result.returncode == 0 and not result.stderr


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| true", "| head -c 1"])
def test_closed_streams(redirect, tmp_path):
    code = "[print('x' * 9999) for _ in range(99)]; print('y', file=sys.stderr); "
    code += f"file = open('{tmp_path}/file', 'w'); assert file.fileno() > 2; sys.stdin.read(0); file.write('whole')"
    result = run_code(code, redirect)
    assert (tmp_path / "file").read_text() == "whole" and b"Error" not in result.stderr
    assert result.returncode == 0


def test_secrets(monkeypatch):
    monkeypatch.setattr(output, "_hidden", {})
    values = {
        "MY_API_KEY": 'sk-"quoted"-key',  # named like a secret
        "PLANTED": "planted-value",  # used by a setting
        "PLACE": "/data/cache-folder",
        "RATE": "0.00000001",
        "OTHER": "not-taken-at-all",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    output.note_secrets("a: ${oc.env:PLANTED}\nb: ${oc.env:PLACE,x}/c\nc: ${oc.env:RATE}\n")
    text = " ".join(values.values()) + r" sk-\"quoted\"-key"
    shown = "${oc.env:MY_API_KEY} ${oc.env:PLANTED} /data/cache-folder 0.00000001 not-taken-at-all ${oc.env:MY_API_KEY}"
    assert output.hide(text) == shown
    assert output.hide("nothing secret") == "nothing secret"


def test_traceback_hides_secrets():
    code = "output.note_secrets(''); raise RuntimeError('refused: sk-planted-key')"
    result = run_code(code, MY_TOKEN="sk-planted-key")
    assert result.returncode == 1 and b"sk-planted" not in result.stdout + result.stderr
    assert result.stderr.strip().endswith(b"RuntimeError: refused: ${oc.env:MY_TOKEN}")
