"""The project's configs and models, from a checkout or from an installed wheel.

As ``detectron2.model_zoo``, but for trained models, of which none is published::

    from iou_balanced_d2 import model_zoo
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml")
    model = model_zoo.get("FCOS/COCO-Detection/fcos_R_50_FPN_1x_iou_balanced.yaml")
"""

from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig
from torch import nn

from ..engine import load_config
from ..engine.checkpoint import RobustCheckpointer
from ..projects import import_projects

__all__ = [
    "get",
    "get_config",
    "get_config_file",
    "get_detectron2_config",
]

_PACKAGE = Path(__file__).resolve().parent
# A wheel has the configs inside this package, a checkout at its top (see setup.py); in both a
# project's are in projects/<Name>/configs.
_ROOTS = (_PACKAGE, _PACKAGE.parent.parent)


def get_config_file(config_path: str) -> str:
    """Path of one of the project's config files.

    Args:
        config_path: name relative to ``configs/``, e.g.
            "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml", or the name of a project and
            then relative to its configs, e.g. "FCOS/COCO-Detection/fcos_R_50_FPN_1x.yaml".

    Returns:
        the path of the file.

    Raises:
        RuntimeError: if there is no such config (as detectron2's function of this name).
    """
    project, _, rest = config_path.partition("/")
    for root in _ROOTS:
        for path in (
            root / "configs" / config_path,
            root / "projects" / project / "configs" / rest,
        ):
            if path.is_file():
                return str(path)
    raise RuntimeError(f"{config_path} not available in the model zoo")


def get_config(config_path: str) -> CfgNode | DictConfig:
    """The config of a model, with the project's keys and defaults.

    Args:
        config_path: as in :func:`get_config_file`.

    Returns:
        a CfgNode for a .yaml file, a DictConfig for a .py file.

    Raises:
        RuntimeError: if there is no such config.
    """
    file = get_config_file(config_path)
    return LazyConfig.load(file) if file.endswith(".py") else load_config(file)


def get_detectron2_config(config_path: str) -> DictConfig:
    """A LazyConfig of detectron2's own zoo, for ours to be based on.

    detectron2's function imports pkg_resources, which newer versions of setuptools do not have.

    Args:
        config_path: name relative to its ``configs/``, e.g.
            "COCO-Detection/retinanet_R_50_FPN_1x.py".

    Returns:
        the config.

    Raises:
        RuntimeError: if the installed detectron2 has no such config.
    """
    path = Path(detectron2.__file__).parent / "model_zoo" / "configs" / config_path
    if not path.is_file():
        raise RuntimeError(f"{config_path} not available in the model zoo of detectron2: {path}")
    return LazyConfig.load(str(path))


def get(config_path: str, *, device: str | None = None) -> nn.Module:
    """The model that a config describes, with its weights loaded.

    Args:
        config_path: as in :func:`get_config_file`.
        device: where the model is to be; None for the config's, or the CPU where there is no CUDA.

    Returns:
        the model, in training mode.

    Raises:
        RuntimeError: if there is no such config.
    """
    cfg = get_config(config_path)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        import_projects()
        model, weights = instantiate(cfg.model), cfg.train.init_checkpoint
        model.to(device or cfg.train.device)
    RobustCheckpointer(model).load(weights)
    return model
