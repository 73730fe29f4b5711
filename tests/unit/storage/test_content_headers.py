from datetime import UTC, datetime

import pytest

from mesh.errors import RangeNotSatisfiable
from services.storage.domain import File
from services.storage.http import byte_range, content_headers


def file(name: str, content_type: str) -> File:
    return File(
        file_id="fil_1", user_id="usr_1", name=name, content_type=content_type, size_bytes=100, sha256="ab",
        create_time=datetime(2026, 1, 1, tzinfo=UTC), ready=True, confirmed=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=90-", (90, 100)),
        ("bytes=90-500", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-500", (0, 100)),
        ("", None),
        ("bytes=-", None),
        ("bytes=20-10", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=0-99999999999999999999", (0, 100)),
        ("bytes=0-" + "9" * 5000, None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_a_range_is_read_as_the_standard_says(header, expected):
    assert byte_range(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_behind_the_end_is_refused(header):
    with pytest.raises(RangeNotSatisfiable) as refusal:
        byte_range(header, 100)

    assert (refusal.value.code, refusal.value.reason) == ("OUT_OF_RANGE", "RANGE_NOT_SATISFIABLE")
    assert refusal.value.metadata["size_bytes"] == "100"


def test_a_name_cannot_break_out_of_its_header():
    disposition = content_headers(file('ä"; x\\.jpg', "image/jpeg"))["content-disposition"]

    assert disposition == "inline; filename=\"__; x_.jpg\"; filename*=UTF-8''%C3%A4%22%3B%20x%5C.jpg"


@pytest.mark.parametrize("content_type", ["image/svg+xml", "text/plain", "application/pdf"])
def test_what_could_run_in_a_browser_is_only_saved(content_type):
    assert content_headers(file("a", content_type))["content-disposition"].startswith("attachment;")
