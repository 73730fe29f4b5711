from datetime import UTC, datetime, timedelta

import pytest

from services.auth.domain import (
    ACCESS_LIFE,
    KEY_LEAD,
    KEY_LIFE,
    REUSE_GRACE,
    VERIFIER_SKEW,
    AccountDisabled,
    RefreshToken,
    RefreshTokenInvalid,
    Session,
    SigningKey,
    access_claims,
    access_expire_time,
    awaited,
    due,
    next_place,
    published,
    replayed,
    require_active,
    require_live,
    signing,
)

NOW = datetime(2026, 10, 5, 12, 0, 0, 700_000, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def key(number, sign_time):
    return SigningKey(key_id=f"key_{number}", number=number, private_pem="", sign_time=sign_time)


def token(**changes):
    return RefreshToken(**{"token_hash": b"", "session_id": "ses_1", "expire_time": NOW + 60 * SECOND} | changes)


def test_the_first_key_signs_at_once():
    assert next_place([], NOW) == (1, NOW)


def test_later_keys_sign_when_every_verifier_has_them():
    assert next_place([key(1, NOW - KEY_LIFE)], NOW) == (2, NOW + KEY_LEAD)


def test_the_old_key_signs_until_the_new_one_begins():
    keys = [key(1, NOW - KEY_LIFE), key(2, NOW + KEY_LEAD)]

    assert signing(keys, NOW).number == 1
    assert signing(keys, NOW + KEY_LEAD).number == 2


def test_a_replica_whose_clock_is_behind_signs_with_the_first_key():
    assert signing([key(1, NOW + SECOND)], NOW).number == 1


def test_a_new_key_is_published_before_it_signs():
    assert [each.number for each in published([key(1, NOW - KEY_LIFE), key(2, NOW + KEY_LEAD)], NOW)] == [1, 2]


def test_an_old_key_stays_until_its_last_token_has_expired():
    keys = [key(1, NOW - KEY_LIFE), key(2, NOW)]
    end = NOW + ACCESS_LIFE + VERIFIER_SKEW

    assert [each.number for each in published(keys, end - SECOND)] == [1, 2]
    assert [each.number for each in published(keys, end)] == [2]


def test_a_key_is_due_when_there_is_none_or_the_newest_has_served_its_time():
    assert due([], NOW)
    assert due([key(1, NOW - KEY_LIFE)], NOW)
    assert not due([key(1, NOW - KEY_LIFE), key(2, NOW + KEY_LEAD)], NOW)


def test_a_key_that_does_not_sign_yet_is_awaited():
    assert awaited([key(1, NOW), key(2, NOW + KEY_LEAD)], NOW).number == 2
    assert awaited([key(1, NOW)], NOW) is None


def test_a_used_refresh_token_is_forgiven_for_a_while():
    used = token(use_time=NOW)

    assert not replayed(token(), NOW)
    assert not replayed(used, NOW + REUSE_GRACE)
    assert replayed(used, NOW + REUSE_GRACE + SECOND)


@pytest.mark.parametrize("missing", [None, token(expire_time=NOW)])
def test_an_unknown_or_expired_refresh_token_is_invalid(missing):
    with pytest.raises(RefreshTokenInvalid):
        require_live(missing, NOW)


def test_a_disabled_account_gets_no_tokens():
    with pytest.raises(AccountDisabled) as refusal:
        require_active("usr_1", active=False)

    assert refusal.value.metadata["user_id"] == "usr_1"


def test_an_access_token_says_whose_it_is_and_until_when():
    claims = access_claims(Session("ses_1", "usr_1", NOW), "ROLE_VIP", "usr_1/3", "jti_1", NOW)

    assert claims == {
        "sub": "usr_1", "sid": "ses_1", "jti": "jti_1", "gen": "usr_1/3", "role": "ROLE_VIP",
        "iat": int(NOW.timestamp()), "exp": int(NOW.timestamp()) + 300,
    }  # fmt: skip
    assert access_expire_time(NOW).timestamp() == claims["exp"]
