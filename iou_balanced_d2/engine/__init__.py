"""Training and evaluation from a config file, in one process or many."""

from .config import load_config
from .launch import find_placement, launch
from .main import main, prepare
from .mixin import TrainerMixin
from .trainer import Trainer

__all__ = [
    "Trainer",
    "TrainerMixin",
    "find_placement",
    "launch",
    "load_config",
    "main",
    "prepare",
]
