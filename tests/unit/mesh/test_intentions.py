"""Which intention counts."""

from __future__ import annotations

import itertools

import pytest

from mesh.intentions import Intention, denied, from_consul

# What Consul ranks them: destination before source, exact before any.
RANKS = {("user", "storage"): 9, ("*", "storage"): 8, ("user", "*"): 6, ("*", "*"): 5}


def intention(source: str, destination: str, *, allows: bool) -> Intention:
    return Intention(source, destination, RANKS[source, destination], allows)


def test_without_an_intention_nobody_is_denied() -> None:
    assert not denied([], "user", "storage")


@pytest.mark.parametrize(("source", "destination"), RANKS)
def test_whom_an_intention_means_by_name_or_by_star_it_denies(source: str, destination: str) -> None:
    assert denied([intention(source, destination, allows=False)], "user", "storage")


@pytest.mark.parametrize(
    ("source", "destination"), [("task", "storage"), ("user", "task"), ("*", "task"), ("task", "*"), ("", "")]
)
def test_whom_an_intention_does_not_mean_it_does_not_deny(source: str, destination: str) -> None:
    assert not denied([Intention(source, destination, 9, allows=False)], "user", "storage")


@pytest.mark.parametrize("higher_allows", [True, False])
@pytest.mark.parametrize(("higher", "lower"), list(itertools.combinations(RANKS, 2)))
def test_of_two_the_one_that_consul_ranks_higher_counts_in_whatever_order(higher, lower, higher_allows: bool) -> None:
    two = [intention(*higher, allows=higher_allows), intention(*lower, allows=not higher_allows)]

    assert denied(two, "user", "storage") is not higher_allows
    assert denied(two[::-1], "user", "storage") is not higher_allows


def test_consuls_words_are_read_and_one_for_some_requests_only_denies() -> None:
    entry = {"SourceName": "user", "DestinationName": "*", "Precedence": 6, "SourceNS": "default", "Meta": {}}

    found = from_consul([{**entry, "Action": "allow"}, {**entry, "Action": "deny"}, {**entry, "Permissions": [{}]}])

    assert [each.allows for each in found] == [True, False, False]
    assert found[0] == Intention("user", "*", 6, allows=True)
    assert from_consul(None) == ()
