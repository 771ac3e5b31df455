"""The project's config files, from a checkout or from an installed wheel."""

from .model_zoo import get_config_file

__all__ = ["get_config_file"]
