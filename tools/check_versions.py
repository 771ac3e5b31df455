#!/usr/bin/env python
r"""Run the tests with the oldest versions that pyproject.toml allows, and with the newest.

python tools/check_versions.py [--only oldest] [TEST ...]

Two environments are made in the output folder by tools/setup_env.py, some 5 GB each: one of the
oldest Python with every requirement at its floor, one of the newest Python with the versions of
constraints.txt. The exit code is 1 if tests fail in one of them.
"""

import argparse
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

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


def oldest(requirements: list[str]) -> list[str]:
    """Constraints that hold every requirement at its floor, but for those of development."""
    pins = ["setuptools<81"]  # detectron2 needs its pkg_resources
    for line in requirements:
        requirement, _, extra = line.partition("; extra == ")
        if not extra:
            found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
            if found is None:
                raise UserError(f"{line!r} has no oldest version: write NAME>=VERSION")
            pins.append(f"{found[1]}=={found[2]}")
            if found[1] == "opencv-python":
                pins.append(f"opencv-python-headless=={found[2]}")
    return pins


def run_tests(python: str, folder: Path, constraints: Path, tests: list[str]) -> bool:
    """Make an environment, or bring it up to date, and run pytest in it; whether all passed."""
    make = [python, "tools/setup_env.py", str(folder), str(constraints), "--use-this-python"]
    env = {**os.environ, "PYTHONPATH": ""}
    try:
        subprocess.run(make, cwd=ROOT, env=env, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{python!r} could not make {folder}: {error}") from error
    pytest = [f"{folder}/bin/python", "-m", "pytest", "-q", "-m", "not slow", *tests]
    return subprocess.run(pytest, cwd=ROOT, env=env).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--oldest", metavar="PYTHON", default="python3.10")
    parser.add_argument("--newest", metavar="PYTHON", default="python3.13")
    parser.add_argument("--only", choices=("oldest", "newest"), help="make and run one of them")
    parser.add_argument("--output", metavar="FOLDER", default="output/versions", type=Path)
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: a selection of them")
    args = parser.parse_args()
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tests = args.tests or list(SELECTION)
    passed = {}
    try:
        floors = folder / "oldest.txt"
        floors.write_text("\n".join(oldest(metadata.requires("iou_balanced_d2") or [])))
        for name, python, constraints, left_out in (
            ("oldest", args.oldest, floors, NOT_WITH_OLDEST),
            ("newest", args.newest, ROOT / "constraints.txt", ()),
        ):
            if args.only in (None, name):
                passed[name] = run_tests(python, folder / name, constraints, [*tests, *left_out])
    except UserError as error:
        print(f"check_versions.py: error: {error}", file=sys.stderr)
        return 2
    for name, all_passed in passed.items():
        print(f"{name} ({folder / name}): {'passed' if all_passed else 'FAILED, see above'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
