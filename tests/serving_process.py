"""Serves the page of `locft try --web` until standard input ends: `python serving_process.py ADAPTER...`.

It prints a line of JSON with the page's address and its temporary folder; and in the end one with the machines that it
looked up or connected to, and the error for a port that is taken. In a process of its own: gradio's server leaves
sockets and event loops open when it ends.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

from peft_locft import AdapterComparison, serve_comparison

LOCAL = ("127.0.0.1", "localhost", "::1", None)


def note_machines() -> list[Any]:
    """Return a list to which every machine is added that is not this one."""
    found: list[Any] = []
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def noted_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOCAL:
            found.append(host)
        return look_up(host, *arguments, **options)

    def noted_connect(self: socket.socket, address: Any) -> None:
        if address[0] not in LOCAL:
            found.append(str(address[0]))
        connect(self, address)

    socket.getaddrinfo = noted_look_up
    socket.socket.connect = noted_connect  # type: ignore[method-assign,assignment]
    return found


def main() -> None:
    machines = note_machines()
    comparison, taken = AdapterComparison.load(sys.argv[1:]), ""
    with serve_comparison(comparison) as page:
        try:
            serve_comparison(comparison, port=int(page.url.rpartition(":")[2].strip("/")))
        except OSError as error:
            taken = str(error)
        print(json.dumps({"url": page.url, "folder": page._folder.name}), flush=True)
        sys.stdin.read()
    print(json.dumps({"machines": machines, "taken": taken}), flush=True)


if __name__ == "__main__":
    main()
