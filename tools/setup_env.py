"""Make the environment of `make test` and the others: FOLDER CONSTRAINTS [--use-this-python].

Where no detectron2 imports: the versions of constraints.txt, and a re-upload of detectron2 pinned
by its hash. Where the environment has one, or the Python that runs this script: it stays as it is,
with torch and all other packages but pip and setuptools; only missing packages are added.
"""

import ctypes.util
import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = "lib/python3*/site-packages"
IMPORT = "import torch, torchvision, detectron2; print('imported')"
REQUIRES = "from importlib.metadata import requires; print(*requires('iou_balanced_d2'), sep='\\n')"
HAS_OPENCV = "import cv2; print('opencv-python', end='')"
CHECK = "import cv2, pycocotools.mask, torchvision, detectron2.modeling, iou_balanced_d2"


def run(*command: object) -> None:
    """Run a command, its output shown."""
    subprocess.run(list(map(str, command)), check=True)


def ask(*command: object) -> str:
    """Return what a command prints, "" if it fails."""
    done = subprocess.run(list(map(str, command)), cwd="/", capture_output=True, text=True)
    return "" if done.returncode else done.stdout


def set_up(folder: Path, constraints: Path, use_this_python: bool) -> None:
    """Make the environment, or bring it up to date if its stamp is not valid."""
    names = ("pyproject.toml", "setup.py", "requirements/detectron2.txt", "tools/setup_env.py")
    # An editable install knows the projects that there were when it was made.
    parts = [str(path) for path in (folder, *ROOT.glob("projects/*/*/__init__.py"))]
    parts += [file.read_text() for file in (constraints, *map(ROOT.joinpath, names))]
    key = hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()
    python, stamp = folder / "bin/python", folder / ".setup-stamp"
    version = "lib/python{}.{}".format(*sys.version_info) if use_this_python else ""
    is_usable = python.exists() and (folder / version).is_dir()
    if is_usable and stamp.exists() and stamp.read_text() == key:
        return
    if not (is_usable or (3, 10) <= sys.version_info[:2] <= (3, 13)):
        sys.exit("setup: error: needs Python 3.10 to 3.13. Name one: PYTHON=python3.12 make setup")
    has_own = any(folder.glob(f"{PACKAGES}/detectron2[-.]*"))
    is_pinned = is_usable and not has_own and any(folder.glob(f"{PACKAGES}/sal_detectron2-*"))
    found = is_usable and not is_pinned and ask(python, "-c", IMPORT)
    if has_own and not found:
        sys.exit(f"setup: error: your detectron2 in {folder} can't be imported by this Python")
    if not (found or is_pinned):
        found = ask(sys.executable, "-c", IMPORT)
        if found or not is_usable:
            create(folder, share_packages=bool(found))
    stamp.write_text("")  # not valid until all is installed
    install(folder, constraints, keep_packages=bool(found))
    stamp.write_text(key)


def create(folder: Path, share_packages: bool) -> None:
    """Make an empty environment of this Python, or one that sees the packages of this Python."""
    clear = ["--clear"] if (folder / "pyvenv.cfg").exists() else []
    run(sys.executable, "-m", "venv", "--without-pip", *clear, folder)
    if share_packages:  # --system-site-packages would not do where this is an environment's Python
        shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (file,) = (packages / "shared.pth" for packages in folder.glob(PACKAGES))
        file.write_text(f"import site; list(map(site.addsitedir, {shared}))")


def install(folder: Path, constraints: Path, keep_packages: bool) -> None:
    """Install this package editable, and what it, its tests and detectron2 require."""
    python, target = folder / "bin/python", ("--target", *folder.glob(PACKAGES))
    if not ask(python, "-m", "pip", "--version"):  # some distributions have no ensurepip
        run(sys.executable, "-m", "pip", "install", "-q", *target, "pip")
    pip = [python, "-m", "pip", "install", "-q", "--no-build-isolation"]
    run(*pip, "-c", constraints, "pip", "setuptools")  # which then build what comes as source
    run(*pip, "--no-deps", "-e", ROOT)
    required = {line.split(";")[0] for line in ask(python, "-c", REQUIRES).splitlines()}
    if keep_packages:  # any version of a package that is there will do, so names alone
        required = {re.split("[<>=]", line)[0] for line in required}
        required -= {"torch", "torchvision", ask(python, "-c", HAS_OPENCV)}
        constraints = folder / "found.txt"
        constraints.write_text(ask(python, "-m", "pip", "list", "--format=freeze"))
    if not all(map(ctypes.util.find_library, ("GL", "gthread-2.0", "xcb"))):
        required = {line.replace("opencv-python", "opencv-python-headless") for line in required}
    run(*pip, "-v", "-c", constraints, *sorted(required))  # -v takes back -q: this is 5 GB
    if not keep_packages:  # one wheel, which for its compiled (unused) part is Python 3.10's
        pip += ["--no-deps", "--only-binary=:all:", "--python-version=3.10", "--require-hashes"]
        run(*pip, "--upgrade", *target, "-r", ROOT / "requirements/detectron2.txt")
    run(python, "-c", CHECK)


if __name__ == "__main__":
    folder, constraints = (Path(word).absolute() for word in sys.argv[1:3])
    try:
        set_up(folder, constraints, "--use-this-python" in sys.argv)
    except (subprocess.CalledProcessError, KeyboardInterrupt):
        sys.exit("setup: error: see above. It needs a network and 7 GB of disk. Then: make setup")
