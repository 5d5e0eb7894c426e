from __future__ import annotations

from layerstore import limits
from layerstore.image import Reference
from layerstore.provider.policy import Ordinary, Outage, Policy


def test_the_longest_prefix_decides():
    policy = Policy(
        ordinary=Ordinary.KNOWN,
        ordinary_by_prefix={
            "host.example": Ordinary.OFF,
            "host.example/team": Ordinary.AUTO,
            "host.example/team/app": Ordinary.EAGER,
            "*.wild.example": Ordinary.EAGER,
        },
    )
    expected = {
        "host.example/other:1": Ordinary.OFF,
        "host.example/team/web:1": Ordinary.AUTO,
        "host.example/team/app:1": Ordinary.EAGER,
        "host.example/team/app/inner:1": Ordinary.EAGER,
        "host.example/teamwork/app:1": Ordinary.OFF,
        "host.example.org/team/app:1": Ordinary.KNOWN,
        "a.wild.example/x:1": Ordinary.EAGER,
        "docker.io/library/x:1": Ordinary.KNOWN,
    }
    for text, wanted in expected.items():
        assert policy.ordinary_for(Reference.parse(text)) is wanted, text


def test_how_long_a_read_waits_is_decided_by_prefix():
    policy = Policy(
        wait_seconds=40.0, outage_by_prefix={"a.example": Outage.FAIL, "a.example/ai": Outage.WAIT}
    )
    patience = {
        text: policy.patience(Reference.parse(text))
        for text in ("a.example/x:1", "a.example/ai/x:1", "b.example/x:1")
    }
    assert list(patience.values()) == [limits.OUTAGE_FAIL_SECONDS, 40.0, 40.0]
