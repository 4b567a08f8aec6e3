"""Containment: one warning for each place, what failed is dropped, and interrupts get through."""

import pytest

from lightning_collapse.utilities.containment import Containment


def test_one_warning_names_owner_place_and_consequence():
    containment = Containment("CollapseMonitor")
    dropped = []
    for place in ("layer `a`", "layer `a`", "layer `b`"):
        if place in containment.failed:
            with containment(place):
                raise ValueError("again")
            continue
        with (
            pytest.warns(UserWarning, match=rf"`CollapseMonitor`: {place} failed with ValueError\('no'\); it ends"),
            containment(place, "it ends", lambda place=place: dropped.append(place)),
        ):
            raise ValueError("no")
    assert dropped == ["layer `a`", "layer `b`"] == list(containment.failed)


def test_what_drops_may_fail_too_and_an_interrupt_gets_through():
    containment = Containment("it")
    with pytest.warns(UserWarning, match="ZeroDivisionError"), containment("here", drop=lambda: [][0]):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), containment("there"):
        raise KeyboardInterrupt
    assert list(containment.failed) == ["here"]
