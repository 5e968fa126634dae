"""A Google Cloud Storage in memory: as much of its JSON API as gcsfs, TensorStore and google-cloud-storage use.

What it doesn't have: hierarchical namespaces, zonal buckets, gRPC, batches (gcsfs sends these to Google only).
"""

import contextlib
import dataclasses
import email
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

ROUTE = re.compile(
    r"(?P<kind>/upload|/download)?/storage/v1/b/(?P<bucket>[^/]+)"
    r"(?:/(?P<objects>o)(?:/(?P<name>[^/]+)(?:/(?P<verb>rewriteTo|moveTo|compose)(?:(?:/b/(?P<to>[^/]+))?/o/(?P<into>[^/]+))?)?)?)?"
)
PAGE = 1000


@dataclasses.dataclass
class Upload:
    """A resumable upload that has begun."""

    bucket: str
    name: str
    preconditions: dict[str, str]
    data: bytes = b""


@dataclasses.dataclass
class Fault:
    """Requests that are to fail, and how many of them are left."""

    pattern: re.Pattern[str]
    status: int
    left: int


class Refused(Exception):
    """A request that is answered with an error: its status and message."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message or f"status {status}")
        self.status = status


class GcsServer(ThreadingHTTPServer):
    """Serves the named buckets on a free port of this machine while it is a context.

    `requests` lists what was asked, as "METHOD path?query" without percent signs.
    """

    request_queue_size = 128

    def __init__(self, *buckets: str, page: int = PAGE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.buckets = {bucket: dict[str, tuple[bytes, int]]() for bucket in buckets}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[str] = []
        self.page = page
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._connections: set[socket.socket] = set()
        self._generation = 0
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "GcsServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        with self.lock:
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends needs no traceback."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def environment(self) -> dict[str, str]:
        """Environment in which gcsfs, google-cloud-storage and TensorStore talk to this server, with no credentials.

        gcsfs would ask about the kind of a bucket over gRPC, on TLS; it is told that there are none but flat ones.
        """
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anonymous",
            "NO_GCE_CHECK": "true",
            "no_proxy": "127.0.0.1",
        }

    @contextlib.contextmanager
    def failing(self, pattern: str, status: int = 503, count: int = 1) -> Iterator["Fault"]:
        """Inside, the next `count` requests that hold the regular expression `pattern` are answered with `status`."""
        fault = Fault(re.compile(pattern), status, count)
        with self.lock:
            self._faults.append(fault)
        try:
            yield fault
        finally:
            with self.lock:
                self._faults.remove(fault)

    def count(self, pattern: str) -> int:
        """How many requests so far hold the regular expression."""
        with self.lock:
            return sum(re.search(pattern, request) is not None for request in self.requests)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of a bucket's objects, sorted."""
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def note(self, request: str) -> None:
        """Counts a request; raises Refused if it is to fail."""
        with self.lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.left and fault.pattern.search(request):
                    fault.left -= 1
                    raise Refused(fault.status, f"the test wants {fault.status} here")

    def put(self, bucket: str, name: str, data: bytes, preconditions: dict[str, str]) -> dict[str, Any]:
        """Writes an object whole; its metadata."""
        with self.lock:
            self.check(bucket, name, preconditions)
            self._generation += 1
            self.buckets[bucket][name] = (data, self._generation)
            return self.metadata(bucket, name)

    def check(self, bucket: str, name: str, query: dict[str, str], unchanged: int = 412) -> None:
        """Raises Refused where the object's generation isn't what the query asks for."""
        generation = str(self.buckets[bucket].get(name, (b"", 0))[1])
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412)
        if query.get("ifGenerationNotMatch") == generation:
            raise Refused(unchanged)

    def get(self, bucket: str, name: str) -> tuple[bytes, int]:
        """Content and generation of an object; raises Refused if there is none."""
        if name not in self.buckets[bucket]:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return self.buckets[bucket][name]

    def metadata(self, bucket: str, name: str) -> dict[str, Any]:
        """An object's resource."""
        data, generation = self.get(bucket, name)
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """A page of objects, and of prefixes that stand for what is behind the delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end, after = query.get("startOffset", ""), query.get("endOffset"), query.get("pageToken", "")
        found: dict[str, bool] = {}
        for name in self.names(bucket, prefix):
            folder, found_delimiter, _ = name[len(prefix) :].partition(delimiter or "\n")
            if name >= first and (not end or name < end):
                found[prefix + folder + found_delimiter if delimiter else name] = bool(delimiter and found_delimiter)
        left = sorted(name for name in found if name > after)
        size = min(self.page, int(query.get("maxResults", self.page)))
        page = left[:size]
        return {
            "kind": "storage#objects",
            "items": [self.metadata(bucket, name) for name in page if not found[name]],
            "prefixes": [name for name in page if found[name]],
            **({"nextPageToken": page[-1]} if len(left) > size else {}),
        }


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: GcsServer

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        try:
            self.server.note(unquote(f"{self.command} {self.path}"))
            match = ROUTE.fullmatch(url.path)
            if match is None:
                raise Refused(404, f"this server has no {url.path}")
            parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
            if parts["bucket"] not in self.server.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            with self.server.lock:
                self._route(parts, dict(parse_qsl(url.query)), body)
        except Refused as error:
            answer = {"error": {"code": error.status, "message": str(error)}}
            self._answer(error.status, b"" if error.status == 304 else json.dumps(answer).encode())

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing: `GcsServer.requests` has it."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: dict[str, Any]) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _route(self, parts: dict[str, str], query: dict[str, str], body: bytes) -> None:
        server, bucket, name = self.server, parts["bucket"], parts.get("name", "")
        method, kind = self.command, parts.get("kind")
        if kind == "/upload":
            self._upload(bucket, query, body)
        elif method == "GET" and "objects" not in parts:
            self._json({"kind": "storage#bucket", "name": bucket, "hierarchicalNamespace": {"enabled": False}})
        elif method == "GET" and not name:
            self._json(server.list(bucket, query))
        elif method == "GET" and query.get("alt") == "media":
            server.check(bucket, name, query, unchanged=304)
            self._download(*server.get(bucket, name))
        elif method == "GET":
            self._json(server.metadata(bucket, name))
        elif method == "DELETE" and name:
            server.get(bucket, name)
            server.check(bucket, name, query)
            del server.buckets[bucket][name]
            self._answer(204)
        elif parts.get("verb") == "rewriteTo":
            data, _ = server.get(bucket, name)
            self._json({"done": True, "resource": server.put(parts["to"], parts["into"], data, query)})
        elif parts.get("verb") == "moveTo":
            data, _ = server.get(bucket, name)
            self._json(server.put(bucket, parts["into"], data, query))
            del server.buckets[bucket][name]
        elif parts.get("verb") == "compose":
            sources = json.loads(body)["sourceObjects"]
            self._json(server.put(bucket, name, b"".join(server.get(bucket, s["name"])[0] for s in sources), query))
        else:
            raise Refused(405, f"this server has no {method} {self.path}")

    def _download(self, data: bytes, generation: int) -> None:
        headers = {"X-Goog-Generation": str(generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data, **headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= end:
            raise Refused(416)
        self._answer(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}", **headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            self._resume(query["upload_id"], body)
        elif query.get("uploadType") == "media":
            self._json(self.server.put(bucket, query["name"], body, query))
        elif query.get("uploadType") == "multipart":
            described, data = _parts(self.headers["Content-Type"], body)
            self._json(self.server.put(bucket, json.loads(described)["name"], data, query))
        else:
            name = query.get("name") or json.loads(body)["name"]
            key = str(len(self.server.uploads))
            self.server.uploads[key] = Upload(bucket, name, query)
            self._answer(200, Location=f"{self.server.url}{urlsplit(self.path).path}?upload_id={key}")

    def _resume(self, key: str, body: bytes) -> None:
        upload = self.server.uploads[key]
        if self.command == "DELETE":
            raise Refused(499)
        upload.data += body
        total = self.headers.get("Content-Range", f"bytes */{len(upload.data)}").rpartition("/")[2]
        if total == str(len(upload.data)):
            self._json(self.server.put(upload.bucket, upload.name, upload.data, upload.preconditions))
        else:
            self._answer(308, **({"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {}))


def _parts(content_type: str, body: bytes) -> Iterator[bytes]:
    """The contents of a multipart body."""
    boundary = email.message_from_string(f"Content-Type: {content_type}\n\n").get_boundary()
    assert boundary is not None
    for part in body.split(b"--" + boundary.encode())[1:-1]:
        yield re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
