"""Imported by the process that forks the ranks of tests (`distributed.py`): it ends with the tests and imports once."""

from arc_ds.system.processes import die_with_parent

die_with_parent()  # at import, because this process does nothing else of its own

import deepspeed  # noqa: E402, F401

import arc_ds.train  # noqa: E402, F401
