"""Names of data sets, which become names of folders and files."""

from urllib.parse import quote

from ..errors import UserError

_LONGEST = 200  # bytes, as quoted; file systems allow 255, and names of files add to it


def check_name(name: str, key: str = "") -> None:
    """Make sure that a data set's name can name a folder: results go to OUTPUT_DIR/inference/NAME.

    Args:
        name: the data set's name.
        key: the config key to name in the error.

    Raises:
        UserError: if it is empty or too long, leads to another folder, or can't be printed.
    """
    leads_away = name in ("", ".", "..") or "/" in name or "\\" in name
    if leads_away or not name.isprintable() or len(quote(name, safe="")) > _LONGEST:
        where = f"{key}: " if key else ""
        raise UserError(
            f"{where}the name {name[:80]!r} can't be a folder's name, as results go to "
            "OUTPUT_DIR/inference/<name>: choose another one, without slashes"
        )
