"""Between atelier.storage.v1 and the domain."""

from __future__ import annotations

import json

from atelier.storage.v1 import storage_pb2 as pb

from mesh.wire import timestamp
from services.storage.domain import File, Origin


def origin_from(work: pb.Work) -> Origin:
    """Return how results come about; storage itself knows what the input's bytes are."""
    return Origin(work.input_file_ids[0], "", work.operation, work.encoder, work.model)


def _provenance(origin: Origin) -> pb.File.Provenance:
    said = json.loads(origin.operation)
    name, version = str(said.pop("operation", "")), int(said.pop("version", 0))
    return pb.File.Provenance(
        input_file_id=origin.input_file_id,
        input_sha256=origin.input_sha256,
        operation=name,
        parameters=json.dumps(said, ensure_ascii=False, sort_keys=True, separators=(",", ":")),
        operation_version=version,
        encoder=origin.encoder,
        model=origin.model,
    )


def file_to_proto(file: File) -> pb.File:
    return pb.File(
        file_id=file.file_id,
        name=file.name,
        content_type=file.content_type,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        task_id=file.task_id or "",
        create_time=timestamp(file.create_time),
        provenance=_provenance(file.origin) if file.origin else None,
    )
