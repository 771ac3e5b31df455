#!/usr/bin/env python3
"""Install iou_balanced_d2, its configs and its projects.

As in detectron2, the folders of the repository differ from the modules of the package in three
places:

    configs/                  -> iou_balanced_d2/model_zoo/configs
    projects/<Name>/configs   -> iou_balanced_d2/model_zoo/projects/<Name>/configs
    projects/<Name>/<package> -> iou_balanced_d2.projects.<package>

In an editable install (`pip install -e .`) the projects are found at once; the configs are those of
the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE = "iou_balanced_d2"


def version() -> str:
    """Return the package's version without importing it."""
    text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"no __version__ in {PACKAGE}/__init__.py")
    return found[1]


def requirements(name: str) -> list[str]:
    """Return the lines of requirements/<name>.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def projects() -> dict[str, str]:
    """Return module name -> folder for every project and every package in it."""
    modules = {}
    for init in sorted(ROOT.glob("projects/*/*/__init__.py")):
        name = f"{PACKAGE}.projects.{init.parent.name}"
        folder = init.parent.relative_to(ROOT).as_posix()
        modules[name] = folder
        for child in find_packages(str(init.parent)):
            modules[f"{name}.{child}"] = f"{folder}/{child.replace('.', '/')}"
    return modules


def configs() -> dict[str, str]:
    """Return module name -> folder for the configs of the repository and of every project."""
    folders = {f"{PACKAGE}.model_zoo.configs": "configs"}
    for folder in sorted(ROOT.glob("projects/*/configs")):
        name = folder.relative_to(ROOT).as_posix()
        folders[f"{PACKAGE}.model_zoo.{name.replace('/', '.')}"] = name
    return folders


PROJECTS, CONFIGS = projects(), configs()

setup(
    name=PACKAGE,
    version=version(),
    description="IoU-balanced loss functions for single-stage object detection, for detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    keywords="object-detection detectron2 retinanet loss iou",
    python_requires=">=3.10",
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *CONFIGS, *PROJECTS],
    package_dir={**CONFIGS, **PROJECTS},
    package_data={PACKAGE: ["py.typed"], **{key: ["**/*.yaml", "**/*.py"] for key in CONFIGS}},
    # Only what is named above; the files of the source archive are in MANIFEST.in.
    include_package_data=False,
    zip_safe=False,
    # The floors are run by tools/check_versions.py, as are the Pythons above.
    # (`make setup` takes opencv-python-headless where the system lacks what this one links to.)
    install_requires=[*requirements("package"), "opencv-python>=4.5.4.60"],
    # fast: evaluation in C++ where detectron2's own is not compiled.
    extras_require={"dev": requirements("dev"), "fast": ["faster-coco-eval>=1.6"]},
)
