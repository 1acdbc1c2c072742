"""What is marked `quick` can start neither Ray nor a server."""

import subprocess

import pytest


def test_a_quick_test_that_starts_ray_fails(request):
    from ray._private.services import (
        GCS_SERVER_EXECUTABLE,
    )  # what ray.init runs first; this process may have a Ray of other tests

    assert request.node.get_closest_marker("quick")
    with pytest.raises(AssertionError, match="a quick test starts gcs_server"):
        subprocess.Popen([GCS_SERVER_EXECUTABLE])


def test_a_quick_test_that_starts_a_server_fails():
    with pytest.raises(AssertionError, match="a quick test starts sglang-cpu-server"):
        subprocess.Popen(["sglang-cpu-server", "--port", "1"])


@pytest.mark.server
def test_any_other_may(request):
    assert not request.node.get_closest_marker("quick")
    assert subprocess.run(["sh", "-c", "true sglang-cpu-server"], check=False).returncode == 0
