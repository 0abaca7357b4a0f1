"""A real ssh server on each host of `tests.helpers.hosts`, with keys that are thrown away.

The hosts alone see its configuration: it is mounted over `/etc/ssh/ssh_config` in their own mount namespaces.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.hosts import Host, wait_until

SERVER = "/usr/sbin/sshd"
_CLIENT_CONFIG = """
Host *
  IdentityFile {folder}/client_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SERVER_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/client_key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
PrintMotd no
"""
_START = """
if ! [ -d /run/sshd ]; then mount -t tmpfs tmpfs /run && mkdir /run/sshd; fi
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
exec "$1" -D -e -f "$2/sshd_config_$(hostname)"
"""


def write_ssh_files(folder: Path, hosts: Sequence[Host]) -> None:
    """Make keys and the configuration of servers and clients in a new folder."""
    folder.mkdir()
    for name in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "ssh_config").write_text(_CLIENT_CONFIG.format(folder=folder))
    for host in hosts:
        config = _SERVER_CONFIG.format(folder=folder, address=host.address)
        (folder / f"sshd_config_{host.name}").write_text(config)


def start_sshd(folder: Path, host: Host) -> None:
    """Start the server of a host and wait until it accepts connections."""
    log = (folder / f"log_{host.name}").open("w")
    server = host.start(["sh", "-c", _START, "sh", SERVER, folder], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    log.close()
    wait_until(lambda: "Server listening" in Path(log.name).read_text(), f"the ssh server of {host.name}", server)


def is_sshd(words: str) -> bool:
    """Whether a command line of `Host.processes` is that of a server or its sessions."""
    return words.startswith("sshd:") or SERVER in words
