"""The tasks: each module defines one as its `TASK`, and `registry` finds it here. README.md says how to add one."""
