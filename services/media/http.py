"""The rpc of atelier.media.v1.MediaService that carries bytes, as an HTTP endpoint (RFC 9110)."""

from __future__ import annotations

from collections.abc import Mapping

from atelier.media.v1 import media_pb2 as pb
from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mesh import bounds
from mesh.errors import InvalidArgument
from mesh.http import Endpoint
from services.media.convert import resize_from
from services.media.domain import Format
from services.media.renders import Originals, Render, Renders

RENDER = "/atelier.media.v1.MediaService/RenderFile"
PREFERRED = (Format.AVIF, Format.WEBP)
"""What a browser has to name before it is sent, the smaller first."""


class QueryMalformed(InvalidArgument):
    reason = "QUERY_MALFORMED"


class RenderEndpoint:
    """Raises MeshError only; the listener turns it into a refusal."""

    def __init__(self, originals: Originals, renders: Renders) -> None:
        self._originals = originals
        self._renders = renders

    def by_rpc(self) -> Mapping[str, Endpoint]:
        """Return the endpoint by the full name of its rpc."""
        return {RENDER: self.render_file}

    async def render_file(self, request: Request) -> Response:
        wanted = request_from(request)
        # Asked each time, also of what is at hand: a file is deleted, and a token revoked, at any moment.
        original = await self._originals.get(wanted.file_id)
        negotiated = preferred(request.headers.get("accept", ""))
        render = Render.of(original, resize_from(wanted), negotiated)
        headers = render_headers(render, varies=not wanted.format)
        if _names(request.headers.get("if-none-match", ""), headers["etag"]):
            return Response(status_code=304, headers=headers)
        rendering = await self._renders.opened(render)
        headers["content-type"] = render.format.content_type
        headers["content-length"] = str(rendering.size_bytes)
        if request.method == "HEAD":
            return Response(headers=headers)
        head = rendering.head()
        if len(head) == rendering.size_bytes:
            return Response(head, headers=headers)
        return StreamingResponse(rendering.rest(head), headers=headers)


def request_from(request: Request) -> pb.RenderFileRequest:
    """Return what a URL asks for.

    Raises:
        QueryMalformed: a parameter that is unknown, given twice, or no value of its kind.
        InvalidArgument: one beyond the contract's bounds.
    """
    given = request.query_params.multi_items()
    said = dict(given)
    if len(said) < len(given) or "fileId" in said or "file_id" in said:
        raise QueryMalformed("Each query parameter may be given once, and the file stands in the path.")
    for name in ("fit", "format"):  # `webp` for FORMAT_WEBP
        if name in said:
            said[name] = f"{name}_{said[name].lower().removeprefix(f'{name}_')}".upper()
    try:
        message = json_format.ParseDict(said, pb.RenderFileRequest(file_id=request.path_params["file_id"]))
    except json_format.ParseError:
        known = ", ".join(field.json_name for field in pb.RenderFileRequest.DESCRIPTOR.fields[1:])
        raise QueryMalformed(
            f"A query parameter is unknown or has no value of its kind; known: {known}.", metadata={"known": known}
        ) from None
    bounds.check(message)
    return message


def preferred(accept: str) -> Format | None:
    """Return which of `PREFERRED` a header `Accept` names, by its weights; None when it names none of them.

    What stands for any image does not count: whoever sends that may know neither.
    """
    weights: dict[str, float] = {}
    for each in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in each.split(";"))
        weight = next((part.removeprefix("q=") for part in parameters if part.startswith("q=")), "1")
        try:
            weights[kind] = float(weight)
        except ValueError:
            weights[kind] = 0.0
    best = max(PREFERRED, key=lambda format_: weights.get(format_.content_type, 0.0))
    return best if weights.get(best.content_type, 0.0) > 0 else None


def render_headers(render: Render, *, varies: bool) -> dict[str, str]:
    """Return what a browser and the caches on the way must know."""
    headers = {
        "etag": f'"{render.key}"',
        "cache-control": "private, no-cache",  # may be kept, must be asked about: the file may be deleted
        "content-disposition": "inline",
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }
    return {**headers, "vary": "accept"} if varies else headers


def _names(if_none_match: str, etag: str) -> bool:
    # Weak comparison, as RFC 9110 section 13.1.2 says. Not `*`: what was never made may turn out to be no image.
    return any(each.strip().removeprefix("W/") == etag for each in if_none_match.split(","))
