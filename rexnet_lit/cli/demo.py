"""The command ``demo``: a page on this computer that classifies the image that one drops on it.

The standard library serves it: Gradio 6.31 excludes Pillow 13, and would bring two dozen packages. The page asks no
other host for anything; its content security policy forbids it.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from rexnet_lit.cli.similar import print_notes
from rexnet_lit.data import decode, image_file
from rexnet_lit.data.image_header import DecodeError
from rexnet_lit.models.limits import COVERAGE
from rexnet_lit.models.predictor import Classifier, load
from rexnet_lit.report.html import THUMBNAIL, data_uri, draw_heat, gallery_entry, render_page, thumbnail
from rexnet_lit.search.similar import Index, build_index
from rexnet_lit.utils.errors import UserError, plural, printable
from rexnet_lit.utils.settings import check_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOP_K, NEAREST = 5, 6


def serve(model: str, folder: str | None, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model: The model file.
        folder: Where to look for images that are similar to the one on the page, if anywhere.
        host: The address.
        port: The port; 0 for any that is free.

    Raises:
        UserError: The model or the folder cannot be read, or the address cannot be used.
    """
    check_range("--port", port, "[0, 65535]", "0 for any that is free")
    classifier = load(model)
    index = build_index(folder, classifier) if folder is not None else None
    if index is not None:
        print_notes(index)
    with build_server(classifier, Path(model).name, host, port, index) as server:
        shown = f"[{host}]" if ":" in host else host
        who = "" if server.is_local else "; it is open to everyone who can reach this computer"
        print(f"http://{shown}:{server.server_address[1]}/  (Ctrl-C ends it{who})", flush=True)  # noqa: T201
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class Server(ThreadingHTTPServer):
    """An HTTP server with a classifier, and the images that it looks for similar ones in."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], classifier: Classifier, name: str, index: Index | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        self.classifier, self.name, self.index, self.lock = classifier, name, index, threading.Lock()
        self.is_local = _is_loopback(str(self.server_address[0]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a browser has gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def build_server(classifier: Classifier, name: str, host: str, port: int, index: Index | None = None) -> Server:
    """Return the server, which listens already.

    Raises:
        UserError: The address cannot be used.
    """
    try:
        return Server((host, port), classifier, name, index)
    except socket.gaierror as error:
        raise UserError(f"--host: {host!r} is no address of this computer ({error.strerror})") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"demo: cannot listen on {host}, port {port} ({reason}); choose another --port") from None


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60  # seconds that a browser may take to send something

    def do_GET(self) -> None:
        if self._is_foreign():
            return
        if self.path != "/":
            self.send_error(404)
            return
        spec, nonce = self.server.classifier.spec, secrets.token_urlsafe()
        view = {
            "model": self.server.name, "backbone": spec.backbone, "nonce": nonce, "limit": image_file.MAX_BYTES,
            "classes": plural(spec.num_classes, "class", "classes"), "index": self.server.index,
            "limits": spec.limits, "coverage": COVERAGE,
        }  # fmt: skip
        policy = (
            f"default-src 'none'; img-src data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        self._reply(render_page("demo.html", view).encode(), headers)

    def do_POST(self) -> None:
        if self._is_foreign():
            return
        name = printable(urllib.parse.unquote(self.headers.get("X-File-Name", "image")))
        try:
            answer = {"name": name, **explained(self.server, self._image())}
        except DecodeError as error:
            answer = {"error": f"{name}: cannot be read as an image ({error})"}
        self._reply(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _image(self) -> NDArray[np.uint8]:
        try:
            length = int(self.headers.get("Content-Length", ""))
            size = max(length, int(self.headers.get("X-File-Size", length)))  # the page sends no file that is too large
        except ValueError:
            raise DecodeError("its size is unknown") from None
        if size > image_file.MAX_BYTES:
            self.close_connection = True
            raise DecodeError(f"{size / 2**20:,.0f} MiB; the limit is {image_file.MAX_BYTES // 2**20} MiB")
        recipe = self.server.classifier.spec.eval_recipe
        return decode.decode(self.rfile.read(max(length, 0)), recipe.resize_size, thorough=True)

    def _is_foreign(self) -> bool:
        """Refuse requests of another site's page, whose name was made to lead to this computer (DNS rebinding)."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        known = host == "localhost" or _is_loopback(host)
        if self.server.is_local and not known:
            self.send_error(403, "This page is for this computer only")
            return True
        return False

    def _reply(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        common = {"Content-Length": str(len(content)), "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        for key, value in {**headers, **common}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about each request."""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def explained(server: Server, image: NDArray[np.uint8]) -> dict[str, Any]:
    """Return what the page shows of an image, uint8 (H, W, 3)."""
    classifier, index, limits = server.classifier, server.index, server.classifier.spec.limits
    found: dict[str, Any] = {}
    with server.lock:
        (classes,) = classifier.predict(image, TOP_K)
        view, heat = classifier.view(image), classifier.explain(image)
        if limits is not None:
            unsure = limits.unsure(np.array([[classes[0].prob]], np.float32))[0]
            marks = {"unsure": unsure, "stranger": limits.strangeness(classifier.embed(image))[0] > 1}
            members = [printable(label) for label, _ in classifier.predict_set(image)[0]]
            found |= {"marks": [word for word, holds in marks.items() if holds], "set": members}
        if index is not None:
            nearest = index.nearest(classifier.embed(image)[0], NEAREST)
    if index is not None:
        found["similar"] = [
            gallery_entry(thumbnail(lambda path: decode.read(index.root / path, THUMBNAIL), row.path), "")
            | {"path": printable(row.path), "label": printable(row.label), "similarity": row.similarity}
            for row in nearest
        ]
    return {
        "classes": [{"label": printable(label), "prob": prob} for label, prob in classes],
        "view": _png(view),
        "heat": _png(draw_heat(view, heat)),
        **found,
    }


def _png(image: NDArray[np.uint8]) -> str:
    return data_uri(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
