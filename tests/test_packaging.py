"""The source archive and the wheel: what is in them, and that both work when installed."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["iou_balanced_d2", "configs", "projects", "requirements", "tools", "demo", "tests"]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "train_net.py"]
FILES += ["Makefile", "constraints.txt"]
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
# What a user of the installed package does, `python -m iou_balanced_d2.config` at last.
# (On the device "meta" a model has no numbers.)
USE = """
import runpy, warnings
warnings.simplefilter("ignore")
import torch
import iou_balanced_d2
from detectron2.modeling import build_model
from iou_balanced_d2.model_zoo import get_config, get_config_file
from iou_balanced_d2.modeling import DenseDetectorWithTTA
from iou_balanced_d2.projects.toy.modeling import VALUE

print(iou_balanced_d2.__path__[0])
print(get_config_file("Base-RetinaNet.yaml"))
print(get_config_file("lazy/toy.py"))
print(get_config_file("Toy/toy.yaml"))
for name in ("SSD/Own/ssd300_R_50.yaml", "FCOS/Demo/fcos_demo.yaml"):
    cfg = get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        print(type(build_model(cfg)).__name__)
runpy.run_module("iou_balanced_d2.config", run_name="__main__")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command, return what it printed; show all of it on failure."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with one more project and one more config."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    write(folder / "projects/Toy/toy/__init__.py", "def add_toy_config(cfg): pass\n")
    write(folder / "projects/Toy/toy/modeling/__init__.py", "VALUE = 1\n")
    write(folder / "projects/Toy/configs/toy.yaml", "VERSION: 2\n")
    write(folder / "configs/lazy/toy.py", "VALUE = 1\n")
    write(folder / "output/model_final.pth", "")
    write(folder / "datasets/photo.jpg", "")
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", SDIST, out, cwd=source)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive: so the archive has all that it takes."""
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "-w", out, sdist, cwd=out)
    (archive,) = out.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    (name,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(name))


def test_wheel_has_every_module_and_every_config(names: set[str]) -> None:
    for file in ROOT.glob("iou_balanced_d2/**/*.py"):
        assert file.relative_to(ROOT).as_posix() in names
    configs = [f for f in ROOT.glob("configs/**/*") if f.suffix in (".yaml", ".py")]
    assert configs
    for file in configs:
        assert f"iou_balanced_d2/model_zoo/{file.relative_to(ROOT).as_posix()}" in names
    for file in ROOT.glob("projects/*/configs/**/*.yaml"):
        assert f"iou_balanced_d2/model_zoo/{file.relative_to(ROOT).as_posix()}" in names


def test_wheel_has_projects_as_subpackages(names: set[str]) -> None:
    assert "iou_balanced_d2/projects/toy/modeling/__init__.py" in names
    for init in ROOT.glob("projects/*/*/__init__.py"):
        assert f"iou_balanced_d2/projects/{init.parent.name}/__init__.py" in names


def test_wheel_has_nothing_else(names: set[str]) -> None:
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"iou_balanced_d2"}
    kinds = {Path(n).suffix for n in names if ".dist-info/" not in n}
    assert kinds <= {".py", ".yaml", ".typed"}
    assert not [n for n in names if "__pycache__" in n or "/tests/" in n]
    assert any(n.endswith("/LICENSE") for n in names)


def test_metadata(metadata: Message) -> None:
    init = (ROOT / "iou_balanced_d2" / "__init__.py").read_text()
    assert f'__version__ = "{metadata["Version"]}"' in init
    assert metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist")
    always = [line for line in required if "extra ==" not in line]
    assert {re.split("[<>=]", line)[0] for line in always} >= {"torch", "opencv-python", "numpy"}
    # Those who have a detectron2 must be able to keep it: it has no name in the registry.
    assert not [r for r in always if re.match("detectron2", r)]
    assert not [r for r in always if re.search("<|==", r)]
    assert "dev" in metadata.get_all("Provides-Extra")


def test_sdist_has_what_it_takes_and_no_data(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "constraints.txt", "requirements/detectron2.txt", "train_net.py"} <= files
    assert {"tools/setup_env.py", "projects/Toy/configs/toy.yaml", "LICENSE"} <= files
    assert not [f for f in files if f.startswith(("output", "datasets", ".venv"))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that sees this one's packages, but for this package."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
    # A path alone: this environment's .pth files, of which one leads to the checkout, are not read.
    others = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    write(packages / "others.pth", "\n".join(others))
    return folder / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_it_works_from_an_empty_folder(
    kind: str, environment: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Installed by pip as a user does, from the wheel and from the source archive."""
    pip = (sys.executable, "-m", "pip", "--python", environment, "install", "--no-index")
    options = ("--no-deps", "--no-build-isolation", "--force-reinstall")
    run(*pip, *options, request.getfixturevalue(kind), cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    found, _, described = run(environment, "-c", USE, cwd=empty).partition("\nMODEL.IOU_BALANCED.")
    package, base, lazy, toy, ssd, fcos = found.splitlines()[-6:]
    assert Path(package).is_relative_to(environment.parents[1])
    zoo = Path(package) / "model_zoo"
    assert base == str(zoo / "configs/Base-RetinaNet.yaml")
    assert lazy == str(zoo / "configs/lazy/toy.py")
    assert toy == str(zoo / "projects/Toy/configs/toy.yaml")
    assert (ssd, fcos) == ("IoUBalancedSSD", "IoUBalancedFCOS")
    assert "CLS_ETA: 1.5\n    eta of eq. 2" in described
    assert "\nMODEL.SSD.SIZE: 300\n" in described
    described = run(environment.parent / "iou-balanced-d2", "check", "--help", cwd=empty)
    assert "--config-file" in described
    assert not list(empty.iterdir())
