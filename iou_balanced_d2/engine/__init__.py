"""Training and evaluation from a config file, in one process or many."""

from .arguments import parse_arguments
from .config import load_config
from .launch import launch
from .main import main, prepare
from .placement import find_placement
from .trainer import Trainer

__all__ = [
    "Trainer",
    "find_placement",
    "launch",
    "load_config",
    "main",
    "parse_arguments",
    "prepare",
]
