"""The Dockerfile, as far as it can be checked without Docker."""

import fnmatch
import re
import shlex

import setup_env

from .documents import ROOT

TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def arguments(instruction):
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{instruction} ")]


def test_the_python_is_one_that_setup_takes():
    (image,) = arguments("FROM")
    found = re.fullmatch(r"python:3\.(\d+)-slim", image)
    assert 10 <= int(found[1]) <= 13


def test_what_is_copied_is_there_and_small():
    sources = [word for line in arguments("COPY") for word in shlex.split(line)[:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (".git", ".venv", "datasets", "output", "output_2"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name
    # Nothing that the project is made of.
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("datasets", "build", "dist") and not path.name.startswith("output"):
            assert not any(fnmatch.fnmatch(path.name, p) for p in ignored), path.name


def test_the_commands_are_there(monkeypatch):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make (\w+)$|\[\"make\", \"(\w+)\"\]", TEXT, re.MULTILINE)
    assert {name for pair in named for name in pair if name} == {"demo", "help"} <= {*targets}
    (script,) = (line for line in arguments("RUN") if line.startswith("python "))
    _, file, folder, constraints, flag = script.split()
    assert (ROOT / file).samefile(setup_env.__file__)
    assert (ROOT / constraints).is_file()
    # What `make` then calls must be the same environment, or it would be made anew.
    assert re.search(rf"^VENV +\?= {re.escape(folder)}$", (ROOT / "Makefile").read_text(), re.M)
    assert f'"{flag}" in sys.argv' in (ROOT / file).read_text()
