from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.storage.domain import (
    File,
    FileNameMalformed,
    Origin,
    Standing,
    Verdict,
    complete,
    fingerprint,
    named_after,
    require_name,
    verdict,
)

RESULT = File(
    file_id="fil_1", user_id="usr_1", name="a.png", content_type="image/png", size_bytes=1, sha256="00",
    task_id="tsk_1", attempt=2, create_time=datetime(2026, 1, 1, tzinfo=UTC), ready=True, confirmed=False,
)  # fmt: skip


@pytest.mark.parametrize("name", ["a", "a b.jpg", "ä" * 255, "..a", "写真.jpg", 'quo"te'])
def test_a_name_that_people_use_passes(name):
    require_name(name)


@pytest.mark.parametrize("name", ["", "a" * 256, "a/b", "a\nb", "\x7f", "..", ".", "a\u2028b"])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(FileNameMalformed) as refusal:
        require_name(name)

    assert (refusal.value.code, refusal.value.reason) == ("INVALID_ARGUMENT", "FILE_NAME_MALFORMED")
    assert refusal.value.metadata["length"] == str(len(name))


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        (None, Verdict.REFUSED),
        (Standing(ended=True, attempt=2, output_file_ids=["fil_1"]), Verdict.TAKEN),
        (Standing(ended=True, attempt=2, output_file_ids=["fil_2"]), Verdict.REFUSED),
        (Standing(ended=False, attempt=2, output_file_ids=[]), Verdict.OPEN),
        (Standing(ended=False, attempt=3, output_file_ids=[]), Verdict.REFUSED),
    ],
)
def test_a_result_stays_only_if_its_task_took_it_or_still_may(standing, expected):
    assert verdict(RESULT, standing) is expected


def test_uploads_under_one_request_id_must_agree_in_name_and_bytes():
    assert fingerprint(RESULT) == fingerprint(replace(RESULT, file_id="fil_2"))
    assert fingerprint(RESULT) != fingerprint(replace(RESULT, name="b.png"))
    assert fingerprint(RESULT) != fingerprint(replace(RESULT, sha256="01"))


@pytest.mark.parametrize(
    ("name", "expected"), [("a.b.png", "a.b-x.jpg"), (".png", ".png-x.jpg"), ("ä" * 255, "ä" * 249 + "-x.jpg")]
)
def test_a_result_of_any_name_has_a_name_that_passes(name, expected):
    assert named_after(name, "-x.jpg") == expected
    require_name(expected)


def test_results_of_two_attempts_that_broke_off_are_not_one_whole():
    of_two = replace(RESULT, origin=Origin("fil_0", "00", "{}", "", "", count=2))
    other = replace(of_two, file_id="fil_2", result_index=1)

    assert complete([of_two, replace(other, attempt=3)]) == []
    assert complete([other, of_two]) == [of_two, other]
