"""Outages of stores that several machines share, for seconds; F33 of the matrix: for a minute."""

from collections.abc import Iterator

import pytest

from tests.chaos.faults_fleet import (
    POSTGRES_KILLED,
    S3_HANGING,
    S3_KILLED,
    Outage,
    fleet_of_its_own,
    survive,
)
from tests.chaos.fleet import Fleet
from tests.chaos.matrix import NotCovered
from tests.chaos.oracle import Oracle
from tests.support.programs import lacking

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

AWAY_S = 3.0


@pytest.fixture(scope="module")
def fleet_and_oracle(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Fleet, Oracle]]:
    try:
        with fleet_of_its_own(tmp_path_factory.mktemp("fleet")) as running:
            yield running
    except NotCovered as reason:
        lacking(str(reason))


@pytest.mark.parametrize("outage", [POSTGRES_KILLED, S3_KILLED, S3_HANGING], ids=lambda o: o.name)
def test_no_acknowledged_job_is_lost(
    outage: Outage, fleet_and_oracle: tuple[Fleet, Oracle]
) -> None:
    fleet, oracle = fleet_and_oracle

    survive(fleet, oracle, outage, AWAY_S)

    for api in fleet.apis:
        fleet.site.accepted.update(api.accepted)
    fleet.site.ended(*fleet.site.accepted_ids(), within_s=120)
    oracle.check()
    assert not [each for each in fleet.workers.values() if each.events("worker cannot go on")]
