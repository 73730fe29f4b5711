"""What a team would write instead: the same read with FastAPI, PyJWT and SQLAlchemy. Run by uvicorn."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import Column, Float, MetaData, Table, Text, select
from sqlalchemy.ext.asyncio import create_async_engine

tasks = Table(
    "peer_task",
    MetaData(),
    Column("task_id", Text, primary_key=True),
    Column("user_id", Text),
    Column("state", Text),
    Column("input_file_id", Text),
    Column("operation", Text),
    Column("fraction", Float),
    Column("stage", Text),
    Column("output_file_ids", Text),
    Column("create_time", Text),
)
engine = create_async_engine(os.environ["PEER_DATABASE_URL"])
keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(os.environ["PEER_JWKS"])["keys"]}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def user(authorization: Annotated[str, Header()]) -> str:
    token = authorization.removeprefix("Bearer ")
    try:
        key = keys[jwt.get_unverified_header(token)["kid"]]
        return jwt.decode(token, key, algorithms=["ES256"], audience="atelier", issuer="atelier")["sub"]
    except (jwt.InvalidTokenError, KeyError):
        raise HTTPException(401) from None


@app.get("/api/v1/tasks/{task_id}")
async def read(task_id: str, user_id: Annotated[str, Depends(user)]) -> dict[str, Any]:
    async with engine.connect() as connection:
        row = (
            await connection.execute(select(tasks).where(tasks.c.task_id == task_id, tasks.c.user_id == user_id))
        ).one_or_none()
    if row is None:
        raise HTTPException(404)
    return {
        "taskId": row.task_id,
        "userId": row.user_id,
        "state": row.state,
        "inputFileId": row.input_file_id,
        "operation": json.loads(row.operation),
        "progress": {"fraction": row.fraction, "stage": row.stage},
        "outputFileIds": json.loads(row.output_file_ids),
        "createTime": row.create_time,
    }
