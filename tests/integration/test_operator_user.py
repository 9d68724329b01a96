"""Which user the operator runs as is the cluster's affair: a Pod's has no name, and nothing of its own on disk."""

from __future__ import annotations

import os

import pytest
from tests.cluster import whole_cluster

pytestmark = [pytest.mark.cluster]

NOBODY = 987_654


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_operator_needs_no_name_for_its_user() -> None:
    # It may read our files, which are root's: a Pod gets its own by a group.
    flags = [
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--bounding-set=-all,+dac_override",
    ]
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *flags]
    with whole_cluster(shims=0, operator=False) as local:
        local.start_operator(under=("setpriv", *user, "--"))
