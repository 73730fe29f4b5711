"""Where a webhook may point to, how its requests are signed and when they are tried again."""

import hashlib
import hmac
from base64 import b64decode, b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network

import pytest

from scripts.local.layout import ROOT
from services.task import webhooks
from services.task.webhooks import (
    Delivery,
    DeliveryState,
    Failure,
    Outcome,
    Patience,
    Webhook,
    WebhookUrlRefused,
    is_public,
    may_reach,
    require_url,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DAY = timedelta(days=1)
PATIENCE = Patience()
OK, BUSY = Outcome(200), Outcome(503)

FINE = [
    "https://example.com",
    "https://example.com/",
    "https://example.com?task=1",
    "HTTPS://Example.COM/hook",
    "http://hooks.example.com:8080/atelier?key=a%20b&at=@home",
    "https://xn--mnchen-3ya.example/",
    "https://under_score.example:443/",
    "https://example.com:65535/",
    "https://1.example/",
    "https://93.184.216.34/hook",
    "https://[2606:2800:220:1:248:1893:25c8:1946]:8443/hook",
]
HOSTILE = [
    # Schemes and forms that two parsers read in two ways.
    "",
    "example.com/hook",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com:6379/_INFO",
    "https:example.com",
    "https:///example.com",
    "//example.com/",
    "https://",
    "https://user@example.com/",
    "https://user:word@example.com/",
    "https://93.184.216.34@127.0.0.1/",
    "https://example.com\\@127.0.0.1/",
    "https://example.com#@127.0.0.1/",
    "https://example.com/#fragment",
    "https://example.com/ x",
    "https://example.com/\r\nhost: internal",
    "https://example.com/\n",
    "https://example.com\t.evil.example/",
    "https://example.com%2f@127.0.0.1/",
    "https://%31%32%37.0.0.1/",
    "https://münchen.example/",
    "https://①②⑦.⓪.⓪.①/",
    "https://127。0。0。1/",
    "https://example.com./",
    "https://.example.com/",
    "https://example..com/",
    "https://-example.com/",
    "https://example.com:/",
    "https://example.com:+443/",
    # Ports of what is no web server.
    "https://example.com:0/",
    "https://example.com:22/",
    "http://example.com:25/",
    "https://example.com:65536/",
    "https://example.com:99999/",
    # Ourselves, our neighbours and our cloud, in each spelling.
    "http://127.0.0.1/",
    "http://127.0.0.1:8500/v1/kv/",
    "http://127.1/",
    "http://127.0.1/",
    "http://2130706433/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://0x7f.0.0.1/",
    "http://0x7f000001/",
    "http://127.0.0.0x1/",
    "http://127.0.0.1.:80/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://168.63.129.16/machine/",
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.169.254.:80/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.0.0.192/",
    "http://192.0.2.1/",
    "http://192.88.99.1/",
    "http://192.168.0.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://256.0.0.1/",
    "http://[::]/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::127.0.0.1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:8.8.8.8]/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b::8.8.8.8]/",
    "http://[64:ff9b:1::1]/",
    "http://[100::1]/",
    "http://[2001::1]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "http://[2001:db8::1]/",
    "http://[2002:7f00:1::]/",
    "http://[3fff::1]/",
    "http://[5f00::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[1::2::3]/",
    "http://[v1.x]/",
    "http://::1/",
]


def delivery(**changes) -> Delivery:
    return replace(
        Delivery(
            delivery_id="whd_1",
            user_id="usr_1",
            task_id="tsk_1",
            sequence=3,
            kind="atelier.task.v1.TaskSucceeded",
            url=None,
            body="{}",
            state=DeliveryState.PENDING,
            attempts=1,
            tries=1,
            status=None,
            failure=None,
            create_time=NOW,
            attempt_time=NOW,
            due_time=NOW,
            expire_time=NOW + DAY,
        ),
        **changes,
    )


def webhook(**changes) -> Webhook:
    return replace(Webhook("usr_1", "https://example.com", "whsec_bmV3", None, None, NOW, NOW), **changes)


def settled(before: Delivery, outcome: Outcome, now: datetime = NOW, jitter: float = 0.5) -> Delivery:
    return webhooks.settled(before, outcome, now, patience=PATIENCE, jitter=jitter)


@pytest.mark.parametrize("url", FINE)
def test_a_plain_address_of_the_web_is_taken(url: str):
    require_url(url, "url")


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_url_is_refused(url: str):
    with pytest.raises(WebhookUrlRefused) as refusal:
        require_url(url, "webhookUrl")

    assert (refusal.value.reason, refusal.value.metadata["field"]) == ("WEBHOOK_URL_REFUSED", "webhookUrl")
    assert "webhookUrl" in refusal.value.violations


def test_no_special_address_is_public():
    special = [
        "10.1.2.3", "127.9.9.9", "169.254.1.1", "172.20.0.1", "192.168.9.9", "100.127.255.255", "0.1.2.3", "192.0.0.8",
        "198.19.255.255", "233.252.0.1", "250.0.0.1", "::", "::1", "::ffff:10.0.0.1", "fdff::1", "febf::1", "ff0e::1",
        "2001:db8:ffff::", "2001:10::1", "100::",
    ]  # fmt: skip

    assert [each for each in special if is_public(ip_address(each))] == []


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2a00:1450:4001::1"])
def test_an_address_of_the_world_is_public(address: str):
    assert is_public(ip_address(address))


def test_a_permitted_network_is_reachable_and_its_neighbours_are_not():
    allowed = [ip_network("127.0.0.2/32"), ip_network("fd00::/8")]

    assert may_reach(ip_address("127.0.0.2"), allowed)
    assert may_reach(ip_address("fd00::5"), allowed)
    assert not may_reach(ip_address("127.0.0.1"), allowed)
    require_url("http://127.0.0.2:8000/", "url", allowed)
    with pytest.raises(WebhookUrlRefused):
        require_url("http://127.0.0.1:8000/", "url", allowed)


def test_the_signature_is_that_of_the_standards_own_example():
    # The vector of the libraries that the specification publishes (standard-webhooks, libraries/*/test).
    signed = b'msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{"test": 2432232314}'

    found = webhooks.signature("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", signed)

    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_request_is_signed_with_its_id_its_time_and_its_body():
    told = delivery(body='{"id":"ü"}')
    secret = webhooks.new_secret(b"k" * webhooks.SECRET_BYTES)

    headers = webhooks.headers(told, [secret], NOW)

    signed = f'tsk_1/3.{int(NOW.timestamp())}.{{"id":"ü"}}'.encode()
    expected = hmac.digest(b64decode(secret.removeprefix("whsec_")), signed, hashlib.sha256)
    assert headers["webhook-id"] == "tsk_1/3"
    assert headers["webhook-signature"] == f"v1,{b64encode(expected).decode()}"


def test_what_the_documentation_shows_to_receivers_verifies_it():
    document = (ROOT / "docs" / "webhooks.md").read_text()
    shown: dict = {}
    exec(document.split("```python")[1].split("```")[0], shown)
    secret, body, now = webhooks.new_secret(b"k" * webhooks.SECRET_BYTES), '{"id":"ü"}', datetime.now(UTC)
    headers = webhooks.headers(delivery(body=body), [webhooks.new_secret(b"other"), secret], now)
    old = webhooks.headers(delivery(body=body), [secret], now - timedelta(minutes=6))

    assert shown["verified"](secret, headers, body.encode())
    assert not shown["verified"](secret, headers, b"{}")
    assert not shown["verified"](webhooks.new_secret(b"else"), headers, body.encode())
    assert not shown["verified"](secret, old, body.encode())


def test_after_a_rotation_both_secrets_sign_for_a_day():
    rotated = webhook(previous_secret="whsec_b2xk", rotate_time=NOW)

    assert webhook().secrets(NOW) == ["whsec_bmV3"]
    assert rotated.secrets(NOW + DAY - timedelta(seconds=1)) == ["whsec_bmV3", "whsec_b2xk"]
    assert rotated.secrets(NOW + DAY) == ["whsec_bmV3"]
    assert webhooks.headers(delivery(), rotated.secrets(NOW), NOW)["webhook-signature"].count("v1,") == 2


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_answer_of_2xx_delivers(status: int):
    after = settled(delivery(), Outcome(status))

    assert (after.state, after.status, after.failure) == (DeliveryState.DELIVERED, status, None)


@pytest.mark.parametrize(
    ("outcome", "failure"),
    [
        (Outcome(199), Failure.REFUSED),
        (Outcome(302), Failure.REFUSED),
        (Outcome(404), Failure.REFUSED),
        (Outcome(500), Failure.REFUSED),
        (Outcome(failure=Failure.NO_ANSWER), Failure.NO_ANSWER),
        (Outcome(failure=Failure.NO_PUBLIC_ADDRESS), Failure.NO_PUBLIC_ADDRESS),
    ],
)
def test_what_did_not_deliver_is_tried_again(outcome: Outcome, failure: Failure):
    after = settled(delivery(), outcome)

    assert (after.state, after.failure, after.due_time) == (DeliveryState.PENDING, failure, NOW + PATIENCE.first)


@pytest.mark.parametrize("outcome", [Outcome(410), Outcome(failure=Failure.WEBHOOK_DELETED)])
def test_what_nobody_wants_is_given_up_at_once(outcome: Outcome):
    assert settled(delivery(), outcome).state is DeliveryState.FAILED


def test_rests_double_up_to_their_bound_and_are_spread():
    rests = [webhooks.rest(tries, PATIENCE, 0.5) for tries in (1, 2, 3, 11, 40, 10_000)]

    assert rests == [*(timedelta(seconds=each) for each in (10, 20, 40, 10_240)), PATIENCE.longest, PATIENCE.longest]
    assert webhooks.rest(1, PATIENCE, 0.0) == timedelta(seconds=5)
    assert webhooks.rest(1, PATIENCE, 1.0) == timedelta(seconds=15)


def test_the_last_request_is_made_when_a_day_is_over():
    late = settled(delivery(tries=30), BUSY, NOW + timedelta(hours=23))
    over = settled(delivery(tries=31), BUSY, NOW + DAY)

    assert (late.state, late.due_time) == (DeliveryState.PENDING, NOW + DAY)
    assert over.state is DeliveryState.FAILED


def test_a_receiver_that_is_away_hears_about_a_dozen_requests_in_a_day():
    now, owed = NOW, delivery()

    while owed.state is DeliveryState.PENDING:
        owed = settled(owed, BUSY, now)
        now, owed = owed.due_time, replace(owed, tries=owed.tries + 1)

    assert now == NOW + DAY
    assert 14 <= owed.tries <= 20


def test_a_resend_begins_anew_and_keeps_the_id():
    given_up = settled(delivery(), Outcome(410))

    again = webhooks.resent(given_up, NOW + 3 * DAY, patience=PATIENCE)

    assert (again.state, again.tries, again.due_time) == (DeliveryState.PENDING, 0, NOW + 3 * DAY)
    assert (again.expire_time, again.event_id) == (NOW + 4 * DAY, "tsk_1/3")
