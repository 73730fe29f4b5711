"""People who use the mesh under test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

PASSWORD = "correct horse battery"


@dataclass(frozen=True)
class Person:
    """A signed-in user and a JSON client that speaks for them."""

    user_id: str
    username: str
    token: str
    http: httpx.AsyncClient

    async def sign_in(self) -> None:
        """Sign in again, as after a change of role."""
        login = await self.http.post("users/login", json={"login": self.username, "password": PASSWORD})
        self.http.headers["authorization"] = f"Bearer {login.json()['accessToken']}"


@asynccontextmanager
async def registered(url: str) -> AsyncIterator[Person]:
    """Register and sign in somebody new at the edge's URL."""
    name = f"u{uuid.uuid4().hex[:12]}"
    account = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
    async with httpx.AsyncClient(base_url=f"{url}/api/v1/", timeout=60) as http:
        made = await http.post("users/register", json=account)
        assert made.status_code == 200, made.text
        login = await http.post("users/login", json={"login": name, "password": PASSWORD})
        assert login.status_code == 200, login.text
        token = login.json()["accessToken"]
        http.headers["authorization"] = f"Bearer {token}"
        yield Person(made.json()["userId"], name, token, http)
