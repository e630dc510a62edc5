"""torchrun with a store that listens on only one address: `python -m megatron_mm.run.launcher`, with torchrun's options.

What torch lacks: the store through which processes find each other listens on every address of its node, whatever `--master-addr` says, and
anyone who can reach it can read and change its contents. This launcher gives it a socket that is bound only to the rendezvous address.

If processes fail, it exits with the exit code of the first one that failed. If a signal ends it (Ctrl-C, the end of a job), it exits with
128 plus the signal's number. It writes no traceback of its own, because the processes have already reported what happened.
"""

from __future__ import annotations

import signal
import socket
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous
from torch.distributed.run import main


class BoundStore(dist.TCPStore):
    """A TCPStore whose listening side binds only to the address of its host name."""

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: timedelta = timedelta(seconds=300),
        wait_for_workers: bool = True,
        multi_tenant: bool = False,
        **others: Any,
    ) -> None:
        if is_master and others.get("master_listen_fd") is None:
            listener = _listen(host_name, port)
            port = listener.getsockname()[1]
            others["master_listen_fd"] = listener.detach()
        super().__init__(host_name, port, world_size, is_master, timeout, wait_for_workers, multi_tenant, **others)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(4096)
    return listener


def install() -> None:
    """Make torchrun's rendezvous, and any other code in this process that creates a store, use `BoundStore`."""
    for module in (static_tcp_rendezvous, c10d_rendezvous_backend, dist):
        module.TCPStore = BoundStore  # type: ignore[attr-defined]


def launch() -> None:
    """Run torchrun's main. Raises SystemExit with the exit code of the first process that failed, or 128 plus the signal's number if it or
    the launcher was ended by a signal, as in a shell."""
    install()
    try:
        main()
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        code = first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
        print(f"launcher: process {rank} was the first to end, with exit code {code}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    except SignalException as error:
        print(f"launcher: ended by {signal.Signals(error.sigval).name}, after its processes", file=sys.stderr, flush=True)
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    launch()
