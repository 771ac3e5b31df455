"""Where the config files are."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# A checkout has the configs at its top, a wheel inside this package (see setup.py).
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent.parent / "configs")


def get_config_file(config_path: str) -> str:
    """Path of one of the project's config files.

    Args:
        config_path: name relative to ``configs/``, e.g.
            "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml".

    Returns:
        the path of the file.

    Raises:
        RuntimeError: if there is no such config (as detectron2's function of this name).
    """
    for folder in _FOLDERS:
        path = folder / config_path
        if path.is_file():
            return str(path)
    raise RuntimeError(f"{config_path} not available in the model zoo")
