"""Print every config key of the project and of its projects, with its default and meaning."""

from .description import config_help, format_help

print(format_help(config_help()))
