"""Where the modules of iou_balanced_d2 lie, its configs and its projects; the rest: pyproject.toml.

As in detectron2, the folders of the repository differ from the modules of the package in three
places:

    configs/                  -> iou_balanced_d2/model_zoo/configs
    projects/<Name>/configs   -> iou_balanced_d2/model_zoo/projects/<Name>/configs
    projects/<Name>/<package> -> iou_balanced_d2.projects.<package>

In an editable install (`pip install -e .`) the projects are found at once; the configs are those of
the repository.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
PACKAGE = "iou_balanced_d2"

# Module name -> folder.
CONFIGS = {
    f"{PACKAGE}.model_zoo.{folder.replace('/', '.')}": folder
    for path in (ROOT / "configs", *sorted(ROOT.glob("projects/*/configs")))
    for folder in [path.relative_to(ROOT).as_posix()]
}
PROJECTS = {
    ".".join((PACKAGE, "projects", *init.parent.relative_to(project).parts)): (
        init.parent.relative_to(ROOT).as_posix()
    )
    for project in sorted(ROOT.glob("projects/*"))
    for init in sorted(project.glob("*/**/__init__.py"))
}

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *CONFIGS, *PROJECTS],
    package_dir={**CONFIGS, **PROJECTS},
    package_data={PACKAGE: ["py.typed"], **{key: ["**/*.yaml", "**/*.py"] for key in CONFIGS}},
    # Only what is named above; the files of the source archive are in MANIFEST.in.
    include_package_data=False,
    zip_safe=False,
)
