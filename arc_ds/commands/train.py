"""`arc-ds train`: start the ranks of a run on this host or on several, and again after a failure."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.launch.parents import stop_with_launchers
from arc_ds.launch.restarts import answering_hosts, choose_hosts, with_restarts
from arc_ds.launch.signals import hold_stop_signals
from arc_ds.launch.ssh import launch_on_hosts, read_hostfile
from arc_ds.launch.wrapper import choose_num_procs, launch
from arc_ds.system import dist
from arc_ds.system.packages import require
from arc_ds.system.user_paths import path_argument

TRAIN_MODULE = "arc_ds.train"


def main(argv: Sequence[str]) -> int:
    """Run with the arguments `CONFIG.yaml [OPTIONS] [key.path=value ...]`; return the exit code.

    Under an external launcher this trains as one rank. Raises ConfigError for an invalid config, hostfile or number of
    processes before it starts any process.
    """
    if dist.under_launcher():
        hold_stop_signals()
        stop_with_launchers()
        return int(import_module(TRAIN_MODULE).main(list(argv)))
    if "--keys" in argv:
        from arc_ds.config.keys import print_keys

        return print_keys([word for word in argv if word != "--keys"])
    arguments = _parser().parse_intermixed_args(list(argv))
    if arguments.restarts < 0:
        raise ConfigError(f"--restarts is {arguments.restarts}, expected at least 0")
    if arguments.min_hosts is not None and not arguments.hostfile:
        raise ConfigError("--min-hosts needs --hostfile, which lists the hosts")
    if arguments.min_hosts is not None and arguments.min_hosts < 1:
        raise ConfigError(f"--min-hosts is {arguments.min_hosts}, expected at least 1")
    if arguments.hostfile and shutil.which("ssh") is None:
        raise ConfigError("--hostfile needs ssh, which is not installed here (Debian: apt-get install openssh-client)")
    require("deepspeed")
    from arc_ds.config.load import load_config
    from arc_ds.config.validate import check_paths
    from arc_ds.planning.sizes import check_tasks

    config = load_config(arguments.config, arguments.overrides)
    check_tasks(config)
    check_paths(config)

    def start(restart: int) -> int:
        words = [arguments.config, *arguments.overrides]
        has_begun = config.checkpoint.resume == "never" or any(Path(config.run_dir, "checkpoints").glob("step_*"))
        if restart and has_begun:
            words.append("checkpoint.resume=auto")  # `never` or a path applied to the first start
        if not arguments.hostfile:
            num_procs = choose_num_procs(arguments.num_procs, config.device)
            return launch(TRAIN_MODULE, words, num_procs=num_procs, device_request=config.device)
        slots = read_hostfile(arguments.hostfile)
        if restart or arguments.min_hosts is not None:
            slots = choose_hosts(
                slots,
                answering_hosts(list(slots)),
                batch_size=config.data.batch_size,
                micro_batches=config.micro_batches,
                min_hosts=arguments.min_hosts or len(slots),
            )
        return launch_on_hosts(TRAIN_MODULE, words, slots=slots, device_request=config.device)

    return with_restarts(start, arguments.restarts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arc-ds train", description="Train a config with the deepspeed launcher, on this host or on several."
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="config overrides")
    parser.add_argument("--keys", nargs="?", metavar="PATTERN", help="only list config keys that match (*data*)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--num-procs", type=int, help="number of processes (default: one per GPU, or one on the CPU)")
    where.add_argument(
        "--hostfile", type=path_argument, help="run on the hosts of this file over ssh (lines `HOST slots=N`)"
    )
    parser.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="after a failure, start again from the last checkpoint"
    )
    parser.add_argument(
        "--min-hosts", type=int, metavar="M", help="if hosts of the hostfile are down, start with fewer, at least M"
    )
    return parser
