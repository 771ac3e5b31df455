"""Training and evaluation from a config file."""

from detectron2.engine import launch

from .arguments import parse_arguments
from .config import load_config
from .main import main, prepare
from .trainer import Trainer

__all__ = ["Trainer", "launch", "load_config", "main", "parse_arguments", "prepare"]
