"""Paths as users write them in configs, arguments and environment variables.

No shell has read these: bash leaves `--out=~/x` as it is, and YAML knows neither `~` nor `$HOME`. Taken literally, such
a path would become a new folder called "~".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.system.urls import is_url

_HOME = re.compile(r"(sqlite:///|file:/{0,3})?(~[^/]*)(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def user_path(text: str) -> str:
    """Replace a leading `~` or `~user` by the home folder, also after `file:` and `sqlite:///`. Other text is returned.

    Raises ConfigError if there is no such home, or if a local path that does not exist has a variable such as `$HOME`.
    """
    if (match := _HOME.fullmatch(text)) is not None:
        scheme, home, rest = match.groups(default="")
        if (folder := os.path.expanduser(home)) == home:
            raise ConfigError(
                f"{text}: this host knows no home folder {home}. Write the whole path. A file that is really named "
                f"{home} is ./{home}."
            )
        return ("file://" if scheme.startswith("file:") else scheme) + folder + rest
    if (variable := _VARIABLE.search(text)) is not None and not is_url(text) and not os.path.lexists(text):
        raise ConfigError(
            f"{text}: the variable {variable.group()} is not replaced here. Write ${{{variable[1]}}} in a config; on "
            f"the command line use no single quotes. If the path is really named so, create it first."
        )
    return text


def absolute_path(text: str) -> str:
    """`user_path`, absolute. URLs stay. Two spellings of a file are then one, in whatever folder a command runs."""
    path = user_path(text)
    return path if is_url(path) else os.path.abspath(path)


def path_argument(text: str) -> Path:
    """`user_path` as a Path: the `type` of a command's arguments."""
    path = Path(user_path(text))
    return path.absolute() if str(path).startswith("~") else path  # Path forgets the ./ of ./~x
