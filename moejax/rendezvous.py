"""The meeting of several processes before JAX starts: all greet process 0, so that what is wrong is said in one line.

JAX's own start aborts a process, with a C++ stack trace, when a peer is missing, and on a port in use may crash.
"""

import json
import os
import socket
import time
from collections.abc import Mapping

from moejax.errors import MoejaxError


def host_port(coordinator: str) -> tuple[str, int]:
    """The two parts of "HOST:PORT"; an IPv6 address stands in brackets.

    Raises:
        MoejaxError: it is not of that form.
    """
    host, colon, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise MoejaxError(
            f'--coordinator "{coordinator}" is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.1:4321'
        )
    return host, int(port)


def await_peers(port: int, num_processes: int, seconds: float) -> None:
    """Process 0: waits on `port`, at most `seconds`, until all processes have said hello, then lets them go.

    Raises:
        MoejaxError: the port is taken, processes are missing or contradict one another; those that came are told too.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise MoejaxError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}); choose another port in "
            "--coordinator, and start only one process with --process-id 0"
        ) from error
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    with server:
        try:
            while len(peers) < num_processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                connection = server.accept()[0]
                _admit(connection, peers, num_processes)
        except TimeoutError as error:
            missing = ", ".join(str(process) for process in range(1, num_processes) if process not in peers)
            problem = (
                f"only {len(peers) + 1} of {num_processes} processes came in {seconds} s (missing: {missing}); "
                "start one for each --process-id with the same --coordinator"
            )
            _dismiss(peers, problem)
            raise MoejaxError(problem) from error
        except MoejaxError as error:
            _dismiss(peers, str(error))
            raise
    _dismiss(peers, "")


def _admit(connection: socket.socket, peers: dict[int, socket.socket], num_processes: int) -> None:
    """Reads one process' greeting and enters it in `peers`; a stranger (a port scanner, say) is hung up on."""
    connection.settimeout(5)
    try:
        greeting = json.loads(connection.makefile("rb").readline(1000))
        process, count = greeting["moejax"]
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return
    twice = process in peers
    peers[-1 if twice else process] = connection
    if count != num_processes:
        raise MoejaxError(f"process {process} was started with --num-processes {count}, process 0 with {num_processes}")
    if twice:
        raise MoejaxError(f"two processes were started with --process-id {process}; give each its own")


def _dismiss(peers: Mapping[int, socket.socket], problem: str) -> None:
    for connection in peers.values():
        try:
            connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
            # The peer hangs up first, so that this side's port is free at once for JAX's service.
            connection.recv(1)
        except OSError:
            pass
        connection.close()


def meet_main(host: str, port: int, num_processes: int, process_id: int, seconds: float) -> None:
    """The other processes: says hello to process 0, trying for `seconds`, and waits to be let go.

    Raises:
        MoejaxError: nobody answers, or what process 0 found wrong.
    """
    deadline = time.monotonic() + seconds
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.settimeout(left + 5)
                connection.sendall(json.dumps({"moejax": [process_id, num_processes]}).encode() + b"\n")
                problem = json.loads(connection.makefile("rb").readline(10_000))["problem"]
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.1)
        except (ValueError, KeyError, TypeError):
            reason = "something that is not a moejax process answers there"
            time.sleep(1)
        else:
            if problem:
                raise MoejaxError(problem)
            return
    raise MoejaxError(
        f"process {process_id} cannot reach process 0 at {host}:{port} within {seconds} s ({reason}); "
        "start a process with --process-id 0 on that host with the same --coordinator"
    )
