"""No network for this Python: it may talk to its own machine only, and every other attempt is refused and noted.

Python imports this file at start-up when its folder is on PYTHONPATH, which `tests/notebooks/plugin.py` arranges for
the kernels of the notebooks; their worker processes inherit it. An audit hook sees every connection and every host
look-up that goes through Python's sockets, and nothing can remove it. Libraries with sockets of their own in C are not
seen.
"""

import os
import sys

LOCAL = frozenset({"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None})
WATCHED = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
LOOK_UPS = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})


def refuse(event, arguments):
    if event in WATCHED:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path: a Unix socket
    elif event in LOOK_UPS:
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host in LOCAL:
        return
    log = os.environ.get("ELIGN_LAB_REFUSED")
    if log:
        with open(log, "a") as file:  # noqa: PTH123 (pathlib would be imported into every process)
            file.write(f"{event} {host}\n")
    raise PermissionError(f"the network is blocked: {event} to {host}; notebooks run without one")


sys.addaudithook(refuse)
