"""Whether a port can be listened on."""

from __future__ import annotations

import os
import socket

from matteserve_server._errors import ResourceError


def check_port(host: str, port: int, flag: str) -> int:
    """Bind a port for a moment.

    Args:
        host: Address to listen on.
        port: Port; 0 takes a free one.
        flag: Option that chooses another, for the message.

    Returns:
        The port.

    Raises:
        ResourceError: It is taken, or the host is not an address of this machine.
    """
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as exc:
        raise ResourceError(f"--host {host} is not an address of this machine: {exc}") from exc
    with socket.socket(info[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(info[4])
        except OSError as exc:
            raise ResourceError(
                f"cannot listen on {host}:{port}: {os.strerror(exc.errno or 0)}; is another server running? Choose "
                f"another port with {flag} (0 takes a free one)"
            ) from exc
        return int(probe.getsockname()[1])
