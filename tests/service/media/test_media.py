from __future__ import annotations

from functools import partial

import pytest
from atelier.media.v1 import media_pb2
from atelier.media.v1.media_pb2_grpc import MediaServiceStub, add_MediaServiceServicer_to_server

from mesh import contract
from mesh.errors import Unauthenticated
from services.media.convert import comments
from services.media.handlers import MediaService
from tests.mesh_server import serving

SAID = comments(contract.IMAGE.read_bytes(), media_pb2.DESCRIPTOR.name)


async def test_a_user_learns_what_can_be_done():
    async with serving(partial(add_MediaServiceServicer_to_server, MediaService(SAID))) as server:
        answer = await MediaServiceStub(server.channel(user="usr_1")).ListOperations(media_pb2.ListOperationsRequest())

    known = [kind.json_name for kind in media_pb2.Operation.DESCRIPTOR.fields]
    assert [each.name for each in answer.operations] == sorted(known)


async def test_nobody_in_particular_learns_nothing():
    async with serving(partial(add_MediaServiceServicer_to_server, MediaService(SAID))) as server:
        with pytest.raises(Unauthenticated):
            await MediaServiceStub(server.channel()).ListOperations(media_pb2.ListOperationsRequest())
