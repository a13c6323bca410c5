"""A gateway before an OpenAI-compatible server: texts about edited subjects go to the adapter, all others to the base.

vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules edited=out-lora
locft scope out
python examples/scope_gateway.py out --base BASE --edited edited --upstream http://localhost:8000
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from peft_locft.adapters import Scope


def texts_of(body: dict[str, Any]) -> list[str]:
    """Return every text of a request: the prompts, or the messages of a conversation, the model's own ones too."""
    prompts = body.get("prompt", [])
    found = [prompts] if isinstance(prompts, str) else [each for each in prompts if isinstance(each, str)]
    for message in body.get("messages", []):
        content = message.get("content") or ""
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        found += parts
    return found


def gateway(scope: Scope, base: str, edited: str, upstream: str, port: int) -> ThreadingHTTPServer:
    """Return a server that sets the model of each request and passes it on.

    Args:
        scope: the adapter's subjects.
        base: the upstream server's name of the base.
        edited: its name of the adapter.
        upstream: its address.
        port: port of the gateway; 0: any.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            in_scope = any(map(scope.matches, texts_of(body)))
            body["model"] = edited if in_scope else base
            headers = {"Content-Type": "application/json", "Authorization": self.headers.get("Authorization", "")}
            request = Request(upstream.rstrip("/") + self.path, json.dumps(body).encode(), headers)
            try:
                response = urlopen(request)
            except HTTPError as error:
                response = error
            with response:
                self.send_response(response.status)
                self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
                self.end_headers()
                while part := response.read1():  # as it comes: an answer may be streamed
                    self.wfile.write(part)

        def log_message(self, *arguments: Any) -> None:
            pass

    return ThreadingHTTPServer(("localhost", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="the adapter's folder, with its scope")
    parser.add_argument("--base", required=True, help="the server's name of the base")
    parser.add_argument("--edited", required=True, help="the server's name of the adapter")
    parser.add_argument("--upstream", default="http://localhost:8000", help="the server's address")
    parser.add_argument("--port", type=int, default=8080, help="port of the gateway")
    options = parser.parse_args()
    server = gateway(Scope.load(options.adapter), options.base, options.edited, options.upstream, options.port)
    print(f"http://localhost:{server.server_port} → {options.upstream}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
