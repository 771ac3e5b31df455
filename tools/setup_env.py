"""Make the virtual environment that `make test`, `make demo` and the others run in.

    python3 tools/setup_env.py [--venv .venv] [--use-this-python] [--constraints FILE] [--dry-run]

One of two things is installed:

* Where no detectron2 can be imported: the versions of constraints.txt, and a re-upload of
  detectron2 pinned by its hash (requirements/detectron2.txt).
* Where one can be imported, in the environment or by the Python that runs this script: nothing that
  is there is touched. torch, torchvision and detectron2 stay as found, and only what is missing is
  added, in versions that fit what was found.

The facts are gathered first (`gather_facts`); `plan` turns them into a list of steps and does
nothing else, so that it can be tested without installing; `run_steps` runs them. A stamp in the
environment says that all of it succeeded, and for which files, Python and folder.

This script uses the standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

OLDEST, NEWEST = (3, 10), (3, 13)
REQUIREMENTS = ("package.txt", "dev.txt", "detectron2-needs.txt")
REUPLOAD = "sal-detectron2"
# Never installed beside a detectron2 that was found: it was built against the ones that are there.
FOUND_WITH_DETECTRON2 = frozenset({"torch", "torchvision", "detectron2"})
# Installed into the environment in any case: to build from source, and for pkg_resources.
INSTALLERS = ("pip", "setuptools")
# Libraries of the system that opencv-python needs; opencv-python-headless does without.
DISPLAY_LIBS = ("libGL.so.1", "libgthread-2.0.so.0", "libxcb.so.1")
STAMP, RUNNING, LOG = ".setup-stamp", ".setup-running", "setup.log"

# Run by the interpreter in question, which may have any packages or none.
PROBE = """
import importlib.util, json, re, site, sys
from importlib import metadata

def origin(name):
    spec = importlib.util.find_spec(name)
    return (spec.origin or "") if spec else ""

def error():
    try:
        import torch, torchvision, detectron2
    except BaseException as e:
        return type(e).__name__ + ": " + str(e)
    return ""

sys.path = [p for p in sys.path if p]
packages = {}
for dist in metadata.distributions():
    name = dist.metadata["Name"]
    if name:
        packages.setdefault(re.sub("[-_.]+", "-", name).lower(), dist.version)
detectron2 = origin("detectron2")
json.dump(
    {
        "executable": sys.executable,
        "version": sys.version_info[:2],
        "packages": packages,
        "detectron2": detectron2,
        "error": error() if detectron2 else "",
        "has_cv2": bool(origin("cv2")),
        "has_pip": bool(origin("pip")),
        "has_ensurepip": bool(origin("ensurepip")),
        "site_dirs": site.getsitepackages() if sys.prefix != sys.base_prefix else [],
    },
    sys.stdout,
)
"""

CHECK = """
import importlib.util, cv2, numpy, pycocotools.mask, torch, torchvision
import detectron2.model_zoo, detectron2.modeling
if importlib.util.find_spec("iou_balanced_d2") is None:
    raise ImportError("iou_balanced_d2 cannot be found")
print("torch %s, torchvision %s, %s" % (torch.__version__, torchvision.__version__,
                                        detectron2.__path__[0]))
"""


# What a failed command printed -> what to do.
ADVICE = {
    "No space left on device": "the disk is full. The environment needs 7 GB",
    "NewConnectionError|NameResolutionError|ConnectTimeout|Max retries exceeded|ProxyError": (
        "no connection to the package index. Check the network or pip's proxy setting"
    ),
    "DO NOT MATCH THE HASHES": "a downloaded file is not the one that was tested. Do not use it",
    "No matching distribution found for sal-detectron2": (
        "the re-upload of detectron2 is for Linux on x86-64. Install detectron2 from its source "
        "into this Python, then run make setup again"
    ),
    "No matching distribution": "a tested version is not to be had for this system",
}


class SetupError(Exception):
    """Something a person has to do; the message is one line that says what."""


@dataclass(frozen=True)
class Interpreter:
    """What one Python has, as its own answer to `PROBE`."""

    executable: str
    version: tuple[int, int]
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distributions by normalised name, with their versions."""
    detectron2: str = ""
    """The file that `import detectron2` would load, "" if there is none."""
    error: str = ""
    """Why `import torch, torchvision, detectron2` fails, "" if it does not."""
    has_cv2: bool = False
    has_pip: bool = True
    has_ensurepip: bool = True
    site_dirs: tuple[str, ...] = ()
    """If it is itself a virtual environment's Python: where that one's packages lie."""

    @property
    def has_detectron2(self) -> bool:
        """Whether it has a detectron2 that imports."""
        return bool(self.detectron2) and not self.error


@dataclass(frozen=True)
class Facts:
    """All that `plan` looks at."""

    root: Path
    venv_dir: Path
    base: Interpreter
    """The Python that runs this script."""
    venv: Interpreter | None
    """The environment's, None if there is none or it does not run."""
    key: str
    """What the stamp says when everything is installed."""
    stamp: str = ""
    damaged: bool = False
    """Whether the environment was moved here, or its last setup was cut off."""
    base_chosen: bool = False
    """Whether a person named the base Python; otherwise an environment keeps the one it has."""
    has_display_libs: bool = True
    """Whether the system has the libraries that opencv-python links to and does not bring."""
    requirements: tuple[str, ...] = ()
    """The lines of the requirement files."""
    constraints_file: Path | None = None
    """Other versions than those of constraints.txt."""

    @property
    def python(self) -> str:
        """The environment's Python."""
        return str(self.venv_dir / "bin" / "python")

    @property
    def opencv(self) -> str:
        """The OpenCV to install where there is none."""
        return "opencv-python" if self.has_display_libs else "opencv-python-headless"

    @property
    def constraints(self) -> tuple[str, str]:
        """The option that tells pip which versions to install."""
        return "-c", str(self.constraints_file or self.root / "constraints.txt")

    def is_inside(self, file: str) -> bool:
        """Whether `file` lies in the environment."""
        return file.startswith(f"{self.venv_dir}{os.sep}")


@dataclass(frozen=True)
class Step:
    """One command; `files` are written before it runs."""

    title: str
    command: tuple[str, ...]
    files: Mapping[Path, str] = field(default_factory=dict)


def plan(facts: Facts) -> list[Step]:
    """Return the steps that lead from `facts` to a complete environment.

    Raises:
        SetupError: If a person has to do something first.
    """
    if facts.venv is not None and facts.stamp == facts.key:
        return []
    venv = usable_environment(facts)
    found = venv if venv and venv.has_detectron2 else None
    if found is None and facts.base.has_detectron2:
        venv, found = None, facts.base
    if found is None or is_reupload(facts, found):
        steps = base_steps(facts, venv, share_base=False)
        steps += pinned_steps(facts, venv)
    else:
        steps = base_steps(facts, venv, share_base=True)
        steps += missing_steps(facts, found)
    return [*steps, Step("check that everything imports", (facts.python, "-c", CHECK))]


def usable_environment(facts: Facts) -> Interpreter | None:
    """Return the environment's Python if the environment can be built upon, else None.

    Raises:
        SetupError: If it can not, but holds a detectron2 that a person put there.
    """
    venv = facts.venv
    if venv is None:
        return None
    has_own = facts.is_inside(venv.detectron2) and not is_reupload(facts, venv)
    if has_own and venv.error:
        raise SetupError(
            f"the detectron2 in {facts.venv_dir} does not import ({venv.error}). Repair or "
            "remove it, then run make setup again"
        )
    other_python = facts.base_chosen and venv.version != facts.base.version
    if OLDEST <= venv.version <= NEWEST and not other_python and not facts.damaged:
        return venv
    if has_own:
        raise SetupError(
            f"{facts.venv_dir} has to be made anew, but holds a detectron2 of your own. "
            "Move it away or remove it, then run make setup again"
        )
    return None


def is_reupload(facts: Facts, python: Interpreter) -> bool:
    """Whether the detectron2 of `python` is one that this script installed."""
    return REUPLOAD in python.packages and facts.is_inside(python.detectron2)


def base_steps(facts: Facts, venv: Interpreter | None, *, share_base: bool) -> list[Step]:
    """Return the steps that lead to an environment with the pinned pip and setuptools.

    Args:
        facts: The facts.
        venv: The environment to build upon; None makes a new one.
        share_base: Whether a new one is to see the packages of the base Python.
    """
    base = facts.base
    has_pip = venv.has_pip if venv else base.has_ensurepip
    if not (has_pip or base.has_pip):
        raise SetupError(
            f"{base.executable} has neither ensurepip nor pip. Install one of them; on Debian "
            "and Ubuntu: apt install python3-venv"
        )
    steps = [] if venv else create_steps(facts, share_base=share_base)
    pip = [facts.python if has_pip else base.executable, "-m", "pip", "install"]
    if not has_pip:
        # Every pip knows --target; `pip --python` came with 22.3.
        pip += ["--target", str(site_packages(facts, (venv or base).version))]
    steps.append(Step("pip and setuptools", (*pip, *facts.constraints, *INSTALLERS)))
    return steps


def create_steps(facts: Facts, *, share_base: bool) -> list[Step]:
    """Return the steps that make a new environment with nothing in it but perhaps pip."""
    base = facts.base
    check_python_version(base.version)
    options = ["--clear"]
    options += ["--system-site-packages"] if share_base else []
    options += [] if base.has_ensurepip else ["--without-pip"]
    title = "{} with Python {}.{}".format(facts.venv_dir.name, *base.version)
    steps = [Step(title, (base.executable, "-m", "venv", *options, str(facts.venv_dir)))]
    if share_base and base.site_dirs:
        # An environment made from another does not see the other's packages; this file helps.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in base.site_dirs]
        file = site_packages(facts, base.version) / "base_environment.pth"
        see = (facts.python, "-c", "import detectron2")
        steps.append(Step("packages of the active environment", see, {file: "".join(lines)}))
    return steps


def check_python_version(version: tuple[int, int]) -> None:
    """Raise SetupError unless `version` is one the project is tested with."""
    if OLDEST <= version <= NEWEST:
        return
    low, high, this = (".".join(map(str, v)) for v in (OLDEST, NEWEST, version))
    raise SetupError(
        f"Python {this} is too {'old' if version < OLDEST else 'new'}, this needs "
        f"{low} to {high}. Name another: PYTHON=python3.12 make setup"
    )


def pinned_steps(facts: Facts, venv: Interpreter | None) -> list[Step]:
    """Return the steps that install the tested versions of everything."""
    files = [a for name in REQUIREMENTS for a in ("-r", str(facts.root / "requirements" / name))]
    opencv = [] if venv and venv.has_cv2 else [facts.opencv]
    title = "torch and all other packages (5 GB the first time, be patient)"
    steps = [
        Step(title, (*pip_install(facts), *facts.constraints, *files, *opencv)),
        package_step(facts),
    ]
    if venv is None or not venv.has_detectron2:
        steps.append(detectron2_step(facts, (venv or facts.base).version))
    return steps


def missing_steps(facts: Facts, found: Interpreter) -> list[Step]:
    """Return the steps that add what is missing beside a detectron2 that was found.

    Every package that `found` has is held at its version, so that no new one brings, say, another
    numpy with it.
    """
    have = {*FOUND_WITH_DETECTRON2, *INSTALLERS, *found.packages}
    missing = [r for r in facts.requirements if requirement_name(r) not in have]
    missing += [] if found.has_cv2 else [facts.opencv]
    steps = [package_step(facts)]
    if missing:
        held = facts.venv_dir / "found.txt"
        title = f"what is missing beside the detectron2 in {Path(found.detectron2).parent}"
        command = (*pip_install(facts), "-c", str(held), *missing)
        steps.insert(0, Step(title, command, {held: pins(found.packages)}))
    return steps


def pip_install(facts: Facts) -> tuple[str, ...]:
    """Return the command that installs into the environment.

    Without build isolation fvcore, iopath and antlr4, which come as sources, are built with the
    pinned setuptools, not with the newest.
    """
    return facts.python, "-m", "pip", "install", "--no-build-isolation"


def package_step(facts: Facts) -> Step:
    """Return the step that installs this package, editable."""
    command = (*pip_install(facts), "--no-deps", "--editable", str(facts.root))
    return Step("iou_balanced_d2", command)


def detectron2_step(facts: Facts, version: tuple[int, int]) -> Step:
    """Return the step that installs the re-upload of detectron2.

    Its one wheel is marked as Python 3.10's for its compiled part, which is not used. pip takes it
    for another Python only with --target.
    """
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--require-hashes"]
    file = facts.root / "requirements" / "detectron2.txt"
    target = ("--target", str(site_packages(facts, version)), "-r", str(file))
    return Step("detectron2", (facts.python, "-m", "pip", "install", *options, *target))


def site_packages(facts: Facts, version: tuple[int, int]) -> Path:
    """Return the environment's folder of packages."""
    return facts.venv_dir / "lib" / "python{}.{}".format(*version) / "site-packages"


def pins(packages: Mapping[str, str]) -> str:
    """Return a constraints file that holds `packages`, but for the installers, as they are."""
    valid = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9.]+)?")
    kept = {n: v for n, v in packages.items() if n not in INSTALLERS and valid.fullmatch(v)}
    return "".join(f"{name}=={version}\n" for name, version in sorted(kept.items()))


def requirement_name(requirement: str) -> str:
    """Return the normalised name in a line such as `PyYAML>=5 ; python_version < "3.11"`."""
    name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirements(root: Path) -> tuple[str, ...]:
    """Return the requirements of all files but detectron2's, without comments."""
    files = [root / "requirements" / name for name in REQUIREMENTS]
    lines = [line.split("#")[0].strip() for f in files for line in f.read_text().splitlines()]
    return tuple(dict.fromkeys(line for line in lines if line))


def setup_key(
    root: Path, venv_dir: Path, version: tuple[int, int], constraints: Path | None = None
) -> str:
    """Return a hash of all that decides what the environment has to hold."""
    constraints = constraints or root / "constraints.txt"
    files = [constraints, root / "setup.py", Path(__file__).resolve()]
    files += sorted((root / "requirements").glob("*.txt"))
    parts = [f.read_text() for f in files]
    # An editable install knows the folders of the projects there were when it was made.
    parts += sorted(str(f.relative_to(root)) for f in root.glob("projects/*/*/__init__.py"))
    parts += [str(root), str(venv_dir), "{}.{}".format(*version)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def gather_facts(
    root: Path, venv_dir: Path, *, base_chosen: bool, constraints: Path | None = None
) -> Facts:
    """Look at the machine; the Pythons are asked only if the stamp is not valid."""
    if venv_dir.is_dir() and any(venv_dir.iterdir()) and not (venv_dir / "pyvenv.cfg").exists():
        raise SetupError(f"{venv_dir} is no virtual environment. Name another folder: VENV=...")
    venv_python = venv_dir / "bin" / "python"
    this = Interpreter(sys.executable, sys.version_info[:2])
    version = this.version if base_chosen else venv_version(venv_dir) or this.version
    key, stamp = setup_key(root, venv_dir, version, constraints), read_text(venv_dir / STAMP)
    if stamp == key and venv_python.exists():
        return Facts(root, venv_dir, this, Interpreter(str(venv_python), version), key, stamp)
    is_moved = str(venv_dir) not in read_text(venv_dir / "bin" / "activate")
    return Facts(
        root=root,
        venv_dir=venv_dir,
        base=ask(sys.executable) or this,
        venv=ask(str(venv_python)) if venv_python.exists() else None,
        key=key,
        stamp=stamp,
        damaged=is_moved or (venv_dir / RUNNING).exists(),
        base_chosen=base_chosen,
        has_display_libs=all(map(can_load, DISPLAY_LIBS)),
        requirements=read_requirements(root),
        constraints_file=constraints,
    )


def ask(python: str) -> Interpreter | None:
    """Return what `python` has, None if it does not run."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
    answer["version"] = tuple(answer["version"])
    answer["site_dirs"] = tuple(answer["site_dirs"])
    return Interpreter(**answer)


def can_load(library: str) -> bool:
    """Whether the system has a shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def read_text(file: Path) -> str:
    """Return the content of `file`, "" if there is no such file."""
    return file.read_text() if file.is_file() else ""


def venv_version(venv_dir: Path) -> tuple[int, int] | None:
    """Return the version of an environment's Python without running it."""
    found = re.search(r"^version\w* *= *(\d+)\.(\d+)", read_text(venv_dir / "pyvenv.cfg"), re.M)
    return (int(found[1]), int(found[2])) if found else None


def run_steps(facts: Facts, steps: list[Step]) -> None:
    """Run `steps`; write the stamp only when all have succeeded.

    While they run a second file says so: if it is still there at the next start, this one was
    cut off, perhaps in the midst of unpacking a package.

    Raises:
        SetupError: If one fails.
    """
    stamp, running = facts.venv_dir / STAMP, facts.venv_dir / RUNNING
    facts.venv_dir.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    for number, step in enumerate(steps, 1):
        running.touch()
        print(f"setup: {number}/{len(steps)} {step.title} ...", end="", flush=True)
        start = time.monotonic()
        try:
            run_step(step, facts.venv_dir / LOG)
        except SetupError:
            print(" failed")
            running.unlink(missing_ok=True)
            raise
        print(f" {time.monotonic() - start:.0f} s", flush=True)
    running.unlink(missing_ok=True)
    stamp.write_text(facts.key)


def run_step(step: Step, log_file: Path) -> None:
    """Run one step, its output going to `log_file`."""
    for file, text in step.files.items():
        file.write_text(text)
    with log_file.open("a+") as log:
        log.write(f"$ {shlex.join(step.command)}\n")
        log.flush()
        start = log.tell()
        done = subprocess.run(step.command, stdout=log, stderr=log, env=pip_environment())
        if done.returncode:
            log.seek(start)  # `python -m venv --clear` may have removed it; it is still open
            raise SetupError(f"{step.title}: {advice(log.read())}. All of its output: {log_file}")


def pip_environment() -> dict[str, str]:
    """Return the variables for pip, without a person's settings that send packages elsewhere."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PIP_TARGET", "PIP_PREFIX")}
    settings = {
        "USER": "0",
        "REQUIRE_VIRTUALENV": "0",
        "NO_INPUT": "1",
        "ROOT_USER_ACTION": "ignore",
    }
    settings.update(DISABLE_PIP_VERSION_CHECK="1", NO_WARN_SCRIPT_LOCATION="1")
    return {**kept, **{f"PIP_{key}": value for key, value in settings.items()}}


def advice(output: str) -> str:
    """Return what to do about a command that failed, from what it printed."""
    for pattern, text in ADVICE.items():
        if re.search(pattern, output):
            return text
    return (output.strip().splitlines() or ["it failed and printed nothing"])[-1].rstrip(".")


def main() -> int:
    """Parse the arguments, make the environment, return the exit status."""
    parser = argparse.ArgumentParser(description="Make the environment for make test, demo, ...")
    parser.add_argument("--venv", default=".venv", help="its folder")
    parser.add_argument(
        "--use-this-python",
        action="store_true",
        help="make the environment anew if it has another version of Python than this one",
    )
    parser.add_argument(
        "--constraints", metavar="FILE", type=Path, help="versions (default: constraints.txt)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    try:
        constraints = args.constraints.resolve() if args.constraints else None
        facts = gather_facts(
            root, root / args.venv, base_chosen=args.use_this_python, constraints=constraints
        )
        steps = plan(facts)
        if args.dry_run:
            print("\n".join(shlex.join(step.command) for step in steps))
        elif steps:
            if facts.venv is None and facts.base.error:
                print(f"setup: {facts.base.detectron2} is not used: {facts.base.error}")
            run_steps(facts, steps)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted. make setup starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
