"""The tasks. Each module defines one as `TASK`, and `registry` finds it. tasks/README.md explains how to add one."""
