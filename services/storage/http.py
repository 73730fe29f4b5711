"""The rpcs of atelier.storage.v1.StorageService that carry bytes, as HTTP endpoints (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import quote

from atelier.storage.v1 import storage_pb2 as pb
from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import Response

from mesh import bounds, capability, context, ids
from mesh.capability import Capability
from mesh.errors import InvalidArgument, RangeNotSatisfiable
from mesh.http import Endpoint, Streamed
from services.storage.convert import file_to_proto, origin_from
from services.storage.domain import Blobs, File, Files, NewFile, Work, require_name, require_not_empty, require_size
from services.storage.keeping import Keeping
from services.storage.signatures import detected_type, require_type

SERVICE = "/atelier.storage.v1.StorageService/"
UPLOAD = f"{SERVICE}UploadFile"


class QueryMalformed(InvalidArgument):
    reason = "QUERY_MALFORMED"


class BytesEndpoints:
    """Raises MeshError only; the listener turns it into a refusal."""

    def __init__(
        self, files: Files, blobs: Blobs, keeping: Keeping, capability_key: str, upload_limit_bytes: int
    ) -> None:
        self._files = files
        self._blobs = blobs
        self._keeping = keeping
        self._capability_key = capability_key
        self._upload_limit_bytes = upload_limit_bytes

    def by_rpc(self) -> Mapping[str, Endpoint]:
        """Return the endpoints by the full name of their rpc."""
        return {
            UPLOAD: self.upload_file,
            SERVICE + "GetFileContent": self.get_file_content,
            SERVICE + "ReadInput": self.read_input,
            SERVICE + "WriteResult": self.write_result,
        }

    async def upload_file(self, request: Request) -> Response:
        user_id = context.user().user_id
        request_id = request.headers.get("idempotency-key", "")
        name = _named(request, known=("name",))
        bounds.check(pb.UploadFileRequest(name=name, request_id=request_id))
        return await self._store(request, name, user_id, self._upload_limit_bytes, request_id=request_id)

    async def write_result(self, request: Request) -> Response:
        granted = self._granted(request)
        name = _named(request, known=("name", "index", "work", "count", "name_ending"))
        asked = pb.WriteResultRequest(
            name=name,
            index=_number(request, "index", 0),
            count=_number(request, "count", 1),
            work=_work(request),
            name_ending=request.query_params.get("name_ending", ""),
        )
        bounds.check(asked)
        work = None
        if asked.HasField("work"):  # workers of before this field do not say it
            origin = replace(origin_from(asked.work), name_ending=asked.name_ending, count=asked.count)
            work = await self._keeping.work(granted, origin, asked.work.input_file_ids[1:])
        return await self._store(
            request, name, granted.user_id, granted.max_bytes, granted=granted, index=asked.index, work=work
        )

    async def get_file_content(self, request: Request) -> Response:
        _require_query(request, known=())
        bounds.check(pb.GetFileContentRequest(file_id=request.path_params["file_id"]))
        return await self._content(request, context.user().user_id)

    async def read_input(self, request: Request) -> Response:
        granted = self._granted(request)
        granted.require_input(request.path_params["file_id"])
        return await self._content(request, granted.user_id)

    def _granted(self, request: Request) -> Capability:
        return capability.verify(self._capability_key, request.headers.get(capability.CAPABILITY_KEY, ""))

    async def _store(
        self,
        request: Request,
        name: str,
        user_id: str,
        limit_bytes: int,
        *,
        request_id: str = "",
        granted: Capability | None = None,
        index: int = 0,
        work: Work | None = None,
    ) -> Response:
        # Before the body is asked for; a length that lies, or is not told, is met while it streams.
        require_size(int(request.headers.get("content-length", 0)), limit_bytes)
        async with self._blobs.received(request.stream(), limit_bytes) as incoming:
            require_not_empty(incoming.size_bytes)
            content_type = detected_type(incoming.head)
            require_type(name, request.headers.get("content-type", ""), content_type)
            new = NewFile(
                file_id=ids.new("fil"),
                user_id=user_id,
                name=name,
                content_type=content_type,
                size_bytes=incoming.size_bytes,
                sha256=incoming.sha256,
                task_id=granted.task_id if granted else None,
                attempt=granted.attempt if granted else None,
                result_index=index,
                work=work.key if work else None,
                origin=work.origin if work else None,
            )
            kept = await self._keeping.keep(new, incoming, request_id)
        answer = json_format.MessageToJson(file_to_proto(kept), always_print_fields_with_no_presence=True)
        return Response(answer, media_type="application/json")

    async def _content(self, request: Request, user_id: str) -> Response:
        file = await self._files.get(user_id, request.path_params["file_id"])
        headers = content_headers(file)
        if _names(request.headers.get("if-none-match", ""), headers["etag"]):
            return Response(status_code=304, headers=headers)
        wanted = None
        if request.method == "GET" and request.headers.get("if-range", headers["etag"]) == headers["etag"]:
            wanted = byte_range(request.headers.get("range", ""), file.size_bytes)
        start, stop = wanted or (0, file.size_bytes)
        headers["content-length"] = str(stop - start)
        headers["content-type"] = file.content_type + ("; charset=utf-8" if file.content_type == "text/plain" else "")
        if wanted:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{file.size_bytes}"
        if request.method == "HEAD":
            return Response(headers=headers)
        content = await self._blobs.read(file.sha256, start, stop)
        return Streamed(content, 206 if wanted else 200, headers)


def byte_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return what a `Range` header asks of a content, as (start, stop) in bytes, stop excluded.

    Returns:
        None for the whole: without a header, and, as RFC 9110 section 14.2 permits, when it is malformed, in
        another unit, or names several ranges.

    Raises:
        RangeNotSatisfiable: it begins behind the end.
    """
    # Twenty digits are more bytes than any file has; int() refuses thousands of them.
    found = re.fullmatch(r"bytes=\s*([0-9]{0,20})-([0-9]{0,20})\s*", header, re.IGNORECASE)
    first, last = found.groups() if found else ("", "")
    if not first and not last:
        return None
    if not first:
        start, stop = max(size_bytes - int(last), 0), size_bytes
    else:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= size_bytes:
        raise RangeNotSatisfiable(
            f"The file has {size_bytes} bytes; the range begins behind its end.",
            metadata={"size_bytes": str(size_bytes), "range": header},
        )
    return start, stop


def content_headers(file: File) -> dict[str, str]:
    """Return what a browser must know to show or save a file, and nothing that lets the file run as a page of ours."""
    shown = file.content_type.startswith("image/") and file.content_type != "image/svg+xml"  # SVG may hold scripts
    plain = re.sub(r'[^ -~]|["\\%]', "_", file.name)  # for what does not read RFC 8187's form
    return {
        "etag": f'"{file.sha256}"',
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",  # may be kept, must be asked about: the file may be deleted
        "content-disposition": f'{"inline" if shown else "attachment"}; filename="{plain}"; '
        f"filename*=UTF-8''{quote(file.name, safe='')}",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }


def _names(if_none_match: str, etag: str) -> bool:
    return any(
        each.strip().removeprefix("W/") in {etag, "*"} for each in if_none_match.split(",")
    )  # weak comparison, as RFC 9110 section 13.1.2 says


def _named(request: Request, known: tuple[str, ...]) -> str:
    """Return the file's name; `known` are the query parameters that may stand there."""
    _require_query(request, known)
    name = request.query_params.get("name", "")
    require_name(name)
    return name


def _number(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", given):
        raise QueryMalformed(
            f"The query parameter {name} must be a whole number.", metadata={"parameter": name, "value": given}
        )
    return int(given)


def _work(request: Request) -> pb.Work | None:
    given = request.query_params.get("work")
    try:
        return None if given is None else json_format.Parse(given, pb.Work())
    except json_format.ParseError:
        raise QueryMalformed(
            "The query parameter work must be a Work in JSON.", metadata={"parameter": "work"}
        ) from None


def _require_query(request: Request, known: tuple[str, ...]) -> None:
    for parameter in request.query_params:
        if parameter not in known:
            raise QueryMalformed(
                f"There is no query parameter {parameter} here; known: {', '.join(known) or 'none'}.",
                metadata={"parameter": parameter, "known": ", ".join(known)},
            )
