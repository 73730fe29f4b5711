"""The tables of the auth service."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Integer, LargeBinary, MetaData, Table, Text

from mesh import lock
from mesh.database import Timestamp

metadata = MetaData()

session = Table(
    "session",
    metadata,
    Column("session_id", Text, primary_key=True),
    Column("user_id", Text, nullable=False, index=True),
    Column("create_time", Timestamp, nullable=False),
    Column("revoke_time", Timestamp),
)

refresh_token = Table(
    "refresh_token",
    metadata,
    Column("token_hash", LargeBinary, primary_key=True),  # SHA-256: the token has 256 random bits, nothing to guess
    Column("session_id", Text, ForeignKey("session.session_id"), nullable=False, index=True),
    Column("expire_time", Timestamp, nullable=False, index=True),
    Column("use_time", Timestamp),
)

revocation = Table(
    "revocation",
    metadata,
    Column("claim", Text, primary_key=True),
    Column("value", Text, primary_key=True),
    Column("expire_time", Timestamp, nullable=False, index=True),
)

signing_key = Table(
    "signing_key",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),  # of two replicas that make one, one wins
    Column("key_id", Text, nullable=False, unique=True),
    Column("private_pem", Text, nullable=False),
    Column("sign_time", Timestamp, nullable=False),
)

lock_table = lock.table(metadata)
