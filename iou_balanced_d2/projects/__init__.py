"""The detectors of ``projects/``, each imported as ``iou_balanced_d2.projects.<package>``.

Like the packages of detectron2's projects they register what they define when they are imported.
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from detectron2.config import CfgNode

# A wheel has the projects in this folder; a checkout has them at its top (see setup.py).
_CHECKOUT = Path(__file__).resolve().parents[2]
if (_CHECKOUT / "setup.py").is_file():
    __path__ += sorted(str(folder) for folder in _CHECKOUT.glob("projects/*/"))


def import_projects() -> dict[str, ModuleType]:
    """Import all projects, which registers their detectors.

    Returns:
        the packages by name, e.g. "fcos".
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def add_project_configs(cfg: CfgNode) -> None:
    """Add the keys of all projects, by each package's ``add_<package>_config(cfg)``."""
    for name, module in import_projects().items():
        getattr(module, f"add_{name}_config")(cfg)
