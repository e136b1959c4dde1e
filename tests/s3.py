"""A small S3 server on a folder, for what pyarrow's client asks of one: buckets, objects, lists, uploads in parts.

It checks no signature. Every folder in its own folder is a bucket.
"""

from __future__ import annotations

import itertools
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import IO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_NO_KEY = "NoSuchKey"


def _unchunked(stream: IO[bytes] | BufferedIOBase) -> bytes:
    """The bytes of chunks: each its size in hexadecimal (and a signature), then as many bytes; up to one of size 0."""
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    return body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or an answer's body would wait 40 ms for its head to arrive
    server: Store

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is the search's."""

    def _ask(self) -> tuple[Path, dict[str, str]]:
        """The file of the object, or the folder of the bucket, and the query."""
        url = urlsplit(self.path)
        self.server.asked.append((self.command, unquote(url.path).lstrip("/")))
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        return self.server.folder / unquote(url.path).lstrip("/"), query

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = _unchunked(self.rfile)
            while self.rfile.readline().strip():
                pass
        else:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("the client has gone in the middle of what it sent")
        signed = self.headers.get("x-amz-content-sha256", "").startswith("STREAMING")
        return _unchunked(BytesIO(body)) if signed else body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in {"Content-Length": length, "ETag": '"0"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _xml(self, status: int, kind: str, content: str) -> None:
        self._answer(status, f'<?xml version="1.0"?><{kind}>{content}</{kind}>'.encode())

    def _missing(self, code: str) -> None:
        self._xml(404, "Error", f"<Code>{code}</Code><Message>{code}</Message>")

    def do_HEAD(self) -> None:
        path, _ = self._ask()
        if path.is_file():
            self._answer(
                200, length=str(path.stat().st_size), Last_Modified=formatdate(path.stat().st_mtime, usegmt=True)
            )
        elif path.parent == self.server.folder and path.is_dir():
            self._answer(200)
        else:
            self._answer(404)

    def do_GET(self) -> None:
        path, query = self._ask()
        if "list-type" in query or path.parent == self.server.folder:
            self._list(path, query.get("prefix", ""), query.get("delimiter", ""))
        elif not path.is_file():
            self._missing(_NO_KEY)
        else:
            self.server.sent.append(str(path.relative_to(self.server.folder)))
            body, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), int(asked[2])
                self._answer(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}")
            else:
                self._answer(200, body)

    def _list(self, bucket: Path, prefix: str, delimiter: str) -> None:
        if not bucket.is_dir():
            return self._missing("NoSuchBucket")
        keys = {path.relative_to(bucket).as_posix(): path for path in sorted(bucket.rglob("*")) if path.is_file()}
        found, common = "", dict[str, None]()
        for key, path in keys.items():
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                common[prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter] = None
                continue
            found += f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size>"
            changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))  # S3 cuts seconds, too
            found += f"<LastModified>{changed}</LastModified></Contents>"
        found += "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in common)
        count = found.count("<Contents>") + len(common)
        return self._xml(
            200, "ListBucketResult", f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>{found}"
        )

    def do_PUT(self) -> None:
        path, query = self._ask()
        body = self._body()
        if "partNumber" in query:
            self.server.parts[query["uploadId"]][int(query["partNumber"])] = body
            return self._answer(200)
        if not self._bucket(path).is_dir():
            return self._missing("NoSuchBucket")
        if not unquote(urlsplit(self.path).path).endswith("/"):  # such a key stands for a folder, which needs none here
            self._keep(path, body)
        return self._answer(200)

    def _bucket(self, path: Path) -> Path:
        return self.server.folder / path.relative_to(self.server.folder).parts[0]

    def _keep(self, path: Path, body: bytes) -> None:
        """Whole or not at all, whoever reads it meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.server.folder, delete=False) as file:  # in no bucket
            file.write(body)
        os.replace(file.name, path)

    def do_POST(self) -> None:
        path, query = self._ask()
        self._body()
        if "uploads" in query:
            upload = str(next(self.server.uploads))
            self.server.parts[upload] = {}
            return self._xml(200, "InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if not self._bucket(path).is_dir():
            return self._missing("NoSuchBucket")
        if parts := self.server.parts.pop(query["uploadId"], {}):  # none where a client has missed the answer
            self._keep(path, b"".join(parts[number] for number in sorted(parts)))
        return self._xml(200, "CompleteMultipartUploadResult", '<ETag>"0"</ETag>')

    def do_DELETE(self) -> None:
        path, _ = self._ask()
        path.unlink(missing_ok=True)
        self._answer(204)


class Store(ThreadingHTTPServer):
    """A server of the buckets in `folder` on a free port.

    sent: the objects that were read, by their names. asked: all requests, by their methods and paths.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.uploads = itertools.count()
        self.parts: dict[str, dict[int, bytes]] = {}  # of the uploads under way, by their id
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def environment(self) -> dict[str, str]:
        """What tells a client the way here."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "something"}


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    with Store(folder) as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.05,))
        thread.start()
        yield store
        store.shutdown()
        thread.join()
