"""Settings that change while a service runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import ClassVar

import pytest
from pydantic import Field

from mesh.config import ServiceConfig
from mesh.live import Live


class Config(ServiceConfig):
    service: ClassVar[str] = "task"
    live: ClassVar[frozenset[str]] = ServiceConfig.live | {"attempts", "pause_seconds"}

    attempts: int = Field(default=3, ge=1, le=20)
    pause_seconds: float = 1.0


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setenv("ATTEMPTS", "5")
    return Config(
        ATELIER_CONSUL_URL="http://c", ATELIER_BROKER_URL="amqp://b", ATELIER_CONTROL_ADDRESSES="c:1",
        ATELIER_DATA_DIR=tmp_path, ATELIER_SECRETS_DIR=tmp_path, ATELIER_INSTANCE="task-1",
    )  # fmt: skip


def said(live: Live) -> dict:
    return json.loads(live.meta["settings"])


def test_what_consul_says_goes_over_what_the_environment_said_and_goes_again(config: Config) -> None:
    live = Live(config)
    at_first = said(live)

    live.take(b'{"attempts": 7, "pause_seconds": 2, "log_level": "ERROR"}')
    changed = (config.attempts, config.pause_seconds, logging.getLogger().level)
    live.take(None)

    assert at_first == {"attempts": 5, "log_level": "INFO", "pause_seconds": 1.0}
    assert changed == (7, 2.0, logging.ERROR)
    assert (config.attempts, config.pause_seconds, logging.getLogger().level) == (5, 1.0, logging.INFO)


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b'{"attempts": 0, "pause_seconds": 9}', "attempts"),
        (b'{"attempts": "7"}', "attempts"),
        (b'{"attemps": 7}', "attemps"),
        (b'{"database_url": "sqlite://"}', "database_url"),
        (b'{"log_level": "LOUD"}', "log_level"),
        (b"{", "Invalid JSON"),
        (b"", "Invalid JSON"),
        (b"[]", ""),
    ],
)
def test_a_bad_change_is_refused_whole_and_told_and_the_last_good_one_stays(
    config: Config, content: bytes, about: str, caplog: pytest.LogCaptureFixture
) -> None:
    live = Live(config)
    live.take(b'{"attempts": 7}')

    live.take(content)

    assert (config.attempts, config.pause_seconds) == (7, 1.0)
    assert about in live.meta["settings_refused"]
    assert said(live)["attempts"] == 7
    assert "config/task is refused" in caplog.text


def test_the_next_good_one_ends_the_complaint(config: Config) -> None:
    live = Live(config)
    live.take(b"{")

    live.take(b'{"attempts": 2}')

    assert live.meta["settings_refused"] == ""
    assert config.attempts == 2


def test_where_it_runs_is_told_only_where_that_is_set(config: Config) -> None:
    assert "zone" not in Live(config).meta
    config.zone = "a"
    assert Live(config).meta["zone"] == "a"
