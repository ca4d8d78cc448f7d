"""The OPTIMADE reference server, behind a proxy with all the usual faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pymatgen.core import Structure

HEADER = {"x-optimade": {"meta": {"api_version": "1.1.0"}}}

GAP = {"name": "gap", "description": "band gap", "type": "float", "unit": "eV"}


def resource(name: str, structure: Structure, **attributes) -> dict:
    """Return a structure as an entry of OPTIMADE."""
    symbols = [site.specie.symbol for site in structure]
    amounts = structure.composition.get_el_amt_dict()
    elements = sorted(amounts)
    return {
        "id": name,
        "type": "structures",
        "attributes": {
            "elements": elements,
            "nelements": len(elements),
            "elements_ratios": [amounts[e] / len(symbols) for e in elements],
            "chemical_formula_descriptive": structure.composition.formula,
            "chemical_formula_reduced": "".join(elements),
            "chemical_formula_anonymous": "A",
            "dimension_types": [1, 1, 1],
            "nperiodic_dimensions": 3,
            "lattice_vectors": structure.lattice.matrix.tolist(),
            "cartesian_site_positions": structure.cart_coords.tolist(),
            "nsites": len(symbols),
            "species_at_sites": symbols,
            "species": [
                {"name": e, "chemical_symbols": [e], "concentration": [1.0]}
                for e in elements
            ],
            "structure_features": [],
            "last_modified": {"$date": "2026-01-01T00:00:00Z"},
            **attributes,
        },
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def reference_server(folder: Path, resources: Sequence[dict]) -> Iterator[int]:
    """Run the reference server with these entries; yield its port."""
    data, port = folder / "data.jsonl", free_port()
    data.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, *resources)))
    settings = {
        "OPTIMADE_INSERT_FROM_JSONL": str(data),
        "OPTIMADE_INSERT_TEST_DATA": "false",
        "OPTIMADE_DATABASE_BACKEND": "mongomock",
        "OPTIMADE_PAGE_LIMIT_MAX": "50",
        "OPTIMADE_PROVIDER_FIELDS": json.dumps({"structures": [GAP]}),
        "OPTIMADE_CONFIG_FILE": str(folder / "none.json"),
        "OPTIMADE_LOG_LEVEL": "error",
    }
    (folder / "none.json").write_text("{}")
    log = folder / "server.log"
    command = [
        sys.executable, "-m", "uvicorn", "optimade.server.main:app",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "error",
    ]  # fmt: skip
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=file, stderr=file
        ) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/v1/info", process, log)
            yield port
        finally:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"the server does not start: {log.read_text()}")


class Proxy:
    """A server before the server: forwards what it gets, unless told otherwise.

    Args:
        port: of the server behind it.
    """

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.faults: list[str] = []
        self.asked: list[tuple[float, str]] = []
        self.delay = 0.0
        self.info: dict | None = None
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.asked.append((time.monotonic(), self.path))
                structures = "/structures" in self.path
                fault = proxy.faults.pop(0) if structures and proxy.faults else ""
                time.sleep(proxy.delay if structures else 0)
                proxy._answer(self, fault)

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def pages_asked(self) -> list[str]:
        return [path for _, path in self.asked if "/structures" in path]

    def _answer(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        kind, _, detail = fault.partition(" ")
        if kind == "drop":  # before a byte is sent
            handler.connection.close()
            return
        status, body = self._upstream(handler.path)
        if handler.path == "/v1/info" and self.info is not None:
            body = json.dumps(self.info).encode()
        length = len(body)
        headers = {}
        if kind == "status":
            status, *rest = map(str, detail.split(" "))
            status, body = int(status), b"busy"
            length = len(body)
            headers = {"Retry-After": rest[0].replace("_", " ")} if rest else {}
        elif kind == "slow":
            time.sleep(float(detail))
        elif kind == "html":
            body = b"<html><body>\n<h1>Down for maintenance</h1></body></html>"
            length = len(body)
        elif kind == "cut":  # the connection breaks in the middle
            body = body[: len(body) // 2]
        elif kind == "half":  # a complete response with half a document
            body = body[: len(body) // 2]
            length = len(body)
        elif kind == "json":
            body, length = detail.encode(), len(detail)
        handler.send_response(status)
        handler.send_header("Content-Length", str(length))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def _upstream(self, path: str) -> tuple[int, bytes]:
        # Our own host name makes the server's links lead back to us.
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.upstream}{path}",
            headers={"Host": f"127.0.0.1:{self.port}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
