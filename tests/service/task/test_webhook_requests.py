"""R-29: requests to addresses that strangers name: over real sockets, with names that mean what an attacker wants."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from scripts.local.authority import Authority, names
from services.task.sender import HttpPosts, posting
from services.task.webhooks import Failure, Outcome
from tests.webhook_receiver import Receiver, receiving

OURS = [ip_network("127.0.0.2/32")]  # the one address of this machine that stands for the world
DELIVERED, NOWHERE = Outcome(204), Outcome(failure=Failure.NO_PUBLIC_ADDRESS)


class Names:
    """Answers each look at a name with the next of `answers`, the last one for ever."""

    def __init__(self, *answers: tuple[str, ...]) -> None:
        self.answers = [[ip_address(each) for each in answer] for answer in answers]
        self.looks: list[str] = []

    async def __call__(self, name: str):
        self.looks.append(name)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Certificates:
    """An authority of its own, and a certificate for hook.example."""

    def __init__(self, folder: Path) -> None:
        root = Authority("A stranger's")
        certificate, key = root.issue("hook.example", names("hook.example"))
        (folder / "pem").write_text(certificate + key)
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(folder / "pem")
        self.trusting = ssl.create_default_context(cadata=root.certificate_pem)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as started:
        yield started


@pytest.fixture
def certificates(tmp_path: Path) -> Iterator[Certificates]:
    return Certificates(tmp_path)


async def post(names: Names, url: str, allowed=OURS, tls: ssl.SSLContext | None = None) -> Outcome:
    return await HttpPosts(names, allowed, tls or ssl.create_default_context()).post(url, {"webhook-id": "x"}, b"{}")


async def test_a_request_goes_to_the_address_that_was_checked_and_names_the_host(receiver: Receiver):
    names = Names(("127.0.0.2",))

    outcome = await post(names, receiver.url("/hook?key=1", host="hook.example"))

    assert (outcome, names.looks) == (DELIVERED, ["hook.example"])
    [heard] = receiver.heard
    assert (heard.at, heard.path, heard.body) == ("127.0.0.2", "/hook?key=1", b"{}")
    assert heard.headers["host"] == f"hook.example:{receiver.port}"


async def test_a_name_that_turns_to_ourselves_after_it_was_checked_is_looked_at_once(receiver: Receiver):
    names = Names(("127.0.0.2",), ("127.0.0.1",))

    first = await post(names, receiver.url(host="rebinding.example"))
    second = await post(names, receiver.url(host="rebinding.example"))

    assert (first, second) == (DELIVERED, NOWHERE)
    assert len(names.looks) == 2
    assert [each.at for each in receiver.heard] == ["127.0.0.2"]


async def test_one_client_looks_anew_for_each_request(receiver: Receiver):
    names = Names(("127.0.0.2",), ("127.0.0.1",))
    posts = HttpPosts(names, OURS, ssl.create_default_context())

    outcomes = [await posts.post(receiver.url(host="rebinding.example"), {}, b"") for _ in range(2)]

    assert outcomes == [DELIVERED, NOWHERE]


async def test_of_several_addresses_only_those_of_the_world_are_connected_to(receiver: Receiver):
    hostile = ("127.0.0.1", "::1", "169.254.169.254", "10.0.0.1", "::ffff:127.0.0.1", "127.0.0.2")

    outcome = await post(Names(hostile), receiver.url(host="mixed.example"))

    assert outcome == DELIVERED
    assert [each.at for each in receiver.heard] == ["127.0.0.2"]


async def test_an_address_that_does_not_answer_is_followed_by_the_next(receiver: Receiver):
    names = Names(("::1", "127.0.0.2"))  # the receiver is at IPv4 addresses alone

    assert await post(names, receiver.url(host="hook.example"), [*OURS, ip_network("::1/128")]) == DELIVERED


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.1", "2130706433", "0x7f.1"])
async def test_what_the_machines_own_names_and_spellings_mean_is_refused(receiver: Receiver, host: str):
    # By the machine's real resolver, without what stands before it when a URL is taken.
    async with posting([]) as posts:
        outcome = await posts.post(receiver.url(host=host), {}, b"{}")

    assert (outcome, receiver.heard) == (NOWHERE, [])


async def test_a_name_that_there_is_not_is_no_other_failure(receiver: Receiver):
    assert await post(Names(()), receiver.url(host="no-such.example")) == NOWHERE


async def test_a_permitted_network_can_be_posted_to(receiver: Receiver):
    async with posting([ip_network("127.0.0.0/8")]) as posts:
        outcome = await posts.post(receiver.url(host="localhost"), {}, b"{}")

    assert outcome == DELIVERED


async def test_an_ipv6_address_is_named_to_its_server_as_in_the_url(receiver: Receiver):
    names = Names(("127.0.0.2",))  # so that a machine without IPv6 can be asked, too

    outcome = await post(names, receiver.url(host="[2001:db8::1]"))

    assert outcome == DELIVERED
    [heard] = receiver.heard
    assert heard.headers["host"] == f"[2001:db8::1]:{receiver.port}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(receiver: Receiver, status: int):
    receiver.statuses, receiver.location = [status], receiver.url("/elsewhere", host="127.0.0.1")

    outcome = await post(Names(("127.0.0.2",)), receiver.url(host="hook.example"))

    assert outcome == Outcome(status)
    assert [each.path for each in receiver.heard] == ["/hook"]


async def test_the_environments_proxy_is_not_asked(receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    async with receiving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url("/"))

        outcome = await post(Names(("127.0.0.2",)), receiver.url(host="hook.example"))

    assert (outcome, len(receiver.heard), proxy.heard) == (DELIVERED, 1, [])


async def test_a_certificate_is_checked_by_the_name_and_not_the_address(certificates: Certificates):
    async with receiving(certificates.server) as receiver:
        names = Names(("127.0.0.2",))
        right = await post(names, receiver.url(host="hook.example"), tls=certificates.trusting)
        wrong_name = await post(names, receiver.url(host="other.example"), tls=certificates.trusting)
        unknown_authority = await post(names, receiver.url(host="hook.example"))

    assert right == DELIVERED
    assert wrong_name == unknown_authority == Outcome(failure=Failure.TLS_FAILED)
    assert len(receiver.heard) == 1


async def test_nobody_there_is_unreachable():
    async with receiving() as gone:
        pass

    assert await post(Names(("127.0.0.2",)), gone.url()) == Outcome(failure=Failure.UNREACHABLE)


async def test_an_answer_that_does_not_come_is_not_waited_for(receiver: Receiver):
    receiver.answering.clear()
    posts = HttpPosts(Names(("127.0.0.2",)), OURS, ssl.create_default_context(), seconds=0.2)

    assert await posts.post(receiver.url(), {}, b"{}") == Outcome(failure=Failure.NO_ANSWER)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 9999 No\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * 1_000_000,
    ],
)
async def test_what_is_no_answer_of_http_does_not_deliver(answer: bytes):
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.2", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await post(Names(("127.0.0.2",)), f"http://hook.example:{port}/")

    assert outcome == Outcome(failure=Failure.NO_ANSWER)


async def test_an_answers_body_is_not_read():
    sent = 0

    async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while True:
                writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                await writer.drain()
                sent += 65536
        except OSError:
            writer.close()

    async with await asyncio.start_server(pour, "127.0.0.2", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await post(Names(("127.0.0.2",)), f"http://hook.example:{port}/")

    assert outcome == Outcome(200)
    assert sent < 64 * 1024 * 1024  # what kernels and readers hold at a time, and no stream without end
