"""Between atelier.storage.v1 and the domain."""

from __future__ import annotations

from atelier.storage.v1 import storage_pb2 as pb

from mesh.wire import timestamp
from services.storage.domain import File


def file_to_proto(file: File) -> pb.File:
    return pb.File(
        file_id=file.file_id,
        name=file.name,
        content_type=file.content_type,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        task_id=file.task_id or "",
        create_time=timestamp(file.create_time),
    )
