"""Options of the subcommands whose work can run on many hosts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from arc_ds.errors import ConfigError
from arc_ds.shards.parallel import Engine, map_in_order
from arc_ds.system.processes import num_cores


class Workers(NamedTuple):
    """The processes that do the work: `workers` of them at the same time, run by `engine`."""

    workers: int
    engine: Engine


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--workers",
        type=int,
        help=f"processes (default: the cores of this host, {num_cores()}; with --engine ray: the CPUs of the cluster)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where the workers run: this host (default), or the hosts of a Ray cluster, with a shared file system",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="cluster: auto or HOST:PORT (default: $RAY_ADDRESS, or else a new Ray on this host)",
    )


@contextmanager
def chosen_workers(namespace: argparse.Namespace) -> Iterator[Workers]:
    """The workers that the options ask for. A Ray that this starts ends with the block."""
    if namespace.engine == "ray":
        from arc_ds.shards.ray_engine import on_cluster  # needs Ray

        with on_cluster(namespace.ray_address, namespace.workers) as engine:
            yield Workers(namespace.workers or 1, engine)  # the engine knows the number of its workers
        return
    if namespace.ray_address is not None:
        raise ConfigError("--ray-address needs --engine ray. Add it, or leave out the address.")
    yield Workers(num_cores() if namespace.workers is None else namespace.workers, map_in_order)
