#!/usr/bin/env python
r"""Run the tests with the oldest versions that setup.py allows, and with the newest.

python tools/check_versions.py [--only oldest] [TEST ...]

Two environments are made in the output folder by tools/setup_env.py, some 5 GB each: one of the
oldest Python with every requirement at its floor, one of the newest Python with the versions of
constraints.txt. A table tells what ran.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

from setup_env import NEWEST, OLDEST
from tabulate import tabulate

from iou_balanced_d2.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# What a version can break: losses, detectors, configs, data, checkpoints; train_net.py alone, with
# --resume, with --eval-only. Left out: distributed runs, documents, installation, most tools.
SELECTION = (
    "tests/losses", "tests/modeling", "tests/projects", "tests/data", "tests/evaluation",
    "tests/analysis", "tests/engine", "tests/test_import.py", "tests/test_configs.py",
    "tests/test_config_help.py", "tests/test_model_zoo.py", "tests/test_lazy_configs.py",
    "tests/test_fine_tuning.py", "tests/tools/test_export_model.py",
)  # fmt: skip
# Several processes on a CPU: PyTorch before 2.8 can hang as it destroys a gloo group.
NOT_WITH_OLDEST = (
    "--ignore=tests/distributed",
    "--deselect=tests/engine/test_checkpoint.py::"
    "test_hosts_without_the_files_get_the_state_of_the_first",
    "--deselect=tests/engine/test_hooks.py::test_two_processes_give_the_mean_over_all_images",
)
SHOWN = ("torch", "torchvision", "numpy", "opencv-python", "matplotlib", "pillow")
VERSIONS = """
import json, platform, sys
from importlib import metadata
def version(name):
    for build in (name, name + "-headless"):
        try:
            return metadata.version(build)
        except metadata.PackageNotFoundError:
            pass
    return "none"
print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))
"""


class Outcome(NamedTuple):
    """How many tests did what; seconds of all."""

    passed: int
    failed: int
    skipped: int
    seconds: float


def requirements() -> list[str]:
    """What setup.py requires, and for its extra "fast"."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (path,) = Path(folder).glob("*/requires.txt")
        always, _, extras = path.read_text().partition("\n[")
    fast = re.search(r"^\[?fast\](.*?)(?=^\[|\Z)", extras, re.MULTILINE | re.DOTALL)
    return [*always.split(), *(fast[1].split() if fast else ())]


def oldest(lines: list[str]) -> list[str]:
    """Constraints that hold every requirement at its floor.

    Raises:
        UserError: naming a requirement that has none.
    """
    pins = ["setuptools<81"]  # detectron2 needs its pkg_resources
    for line in lines:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", line)
        if found is None:
            raise UserError(f"{line!r} of setup.py has no oldest version: write NAME>=VERSION")
        builds = (found[1], f"{found[1]}-headless") if found[1] == "opencv-python" else (found[1],)
        pins += [f"{name}=={found[2]}" for name in builds]
    return pins


def make_environment(python: str, folder: Path, constraints: Path) -> str:
    """Make an environment, or bring it up to date; returns its Python.

    Raises:
        UserError: if there is no such Python, or the installation fails.
    """
    # A name may be that of a version manager's script, which can find no such Python either.
    if (
        shutil.which(python) is None
        or subprocess.run([python, "-V"], capture_output=True).returncode
    ):
        raise UserError(f"{python!r} can't be run: name another by --oldest or --newest")
    command = [python, "tools/setup_env.py", "--use-this-python", "--venv", str(folder)]
    if subprocess.run([*command, "--constraints", str(constraints)], cwd=ROOT).returncode:
        raise UserError(f"{folder} could not be made, see above")
    return str(folder / "bin" / "python")


def run_tests(python: str, tests: list[str], report: Path) -> Outcome:
    """Run pytest by an environment's Python; `report` is where its JUnit file goes.

    Raises:
        UserError: if it did not come to run tests.
    """
    report.unlink(missing_ok=True)
    start = time.monotonic()
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", f"--junitxml={report}"]
    env = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([python, "-m", "pytest", *options, *tests], cwd=ROOT, env=env)
    if not report.is_file():
        raise UserError(f"{python}: pytest did not run the tests, see above")
    (suite,) = xml.etree.ElementTree.parse(report).getroot().iter("testsuite")
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return Outcome(passed, failed, count["skipped"], time.monotonic() - start)


def versions(python: str) -> list[str]:
    """The version of Python, and of each package in SHOWN."""
    done = subprocess.run([python, "-c", VERSIONS, *SHOWN], capture_output=True, check=True)
    return list(json.loads(done.stdout))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    low, high = ("python{}.{}".format(*version) for version in (OLDEST, NEWEST))
    parser.add_argument("--oldest", metavar="PYTHON", default=low, help=f"default: {low}")
    parser.add_argument("--newest", metavar="PYTHON", default=high, help=f"default: {high}")
    parser.add_argument("--only", choices=("oldest", "newest"), help="make and run one of them")
    parser.add_argument("--output", metavar="FOLDER", default="output/versions", type=Path)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: a selection of them")
    return parser.parse_args()


def check(args: argparse.Namespace) -> bool:
    """Make the environments, run the tests, print the table; returns whether all passed."""
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    floors = folder / "oldest.txt"
    floors.write_text("".join(f"{line}\n" for line in oldest(requirements())))
    tests = args.tests or list(SELECTION)
    rows, num_failed = [], 0
    for name, python, constraints, left_out in (
        ("oldest", args.oldest, floors, NOT_WITH_OLDEST),
        ("newest", args.newest, ROOT / "constraints.txt", ()),
    ):
        if args.only in (None, name):
            env = make_environment(python, folder / name, constraints)
            outcome = run_tests(env, [*tests, *left_out], folder / f"{name}.xml")
            num_failed += outcome.failed
            rows.append([name, *versions(env), *outcome[:3], f"{outcome.seconds:.0f}"])
    header = ["", "Python", *SHOWN, "passed", "failed", "skipped", "seconds"]
    print(f"tests: {' '.join(tests)}\n\n{tabulate(rows, header, 'github', disable_numparse=True)}")
    return num_failed == 0


def main() -> int:
    try:
        return 0 if check(parse_arguments()) else 1
    except UserError as error:
        print(f"check_versions.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
