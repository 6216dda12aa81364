"""Fixtures over a real ComfyUI; without one every host test is skipped with how to get one."""

import json
import os
import subprocess

import pytest

from demo import server as instance

HOST = instance.find_host()


def pytest_collection_modifyitems(items):
    if HOST is None:
        for item in items:
            if "tests/host/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=instance.HOW_TO))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return instance.make_base(tmp_path_factory.mktemp("comfy") / "base")


@pytest.fixture(scope="session")
def server(base):
    with instance.Server(HOST, base) as running:
        yield running


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    """What probe.py found out inside the host's own process: check name -> numbers."""
    folder = instance.make_base(tmp_path_factory.mktemp("probe") / "base")
    result = run_probe(HOST, folder)
    return result


@pytest.fixture(scope="session")
def live_probe(tmp_path_factory):
    """What live_probe.py found out inside the host's own process: check name -> numbers."""
    return run_probe(HOST, instance.make_base(tmp_path_factory.mktemp("live") / "base"), "live_probe.py")


def run_probe(host, folder, script="probe.py"):
    command = [
        instance.interpreter(host),
        instance.PACK / "tests" / "host" / script,
        host,
        folder,
        folder / "result.json",
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=host, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    from tests.host.training import write_clip_l

    return write_clip_l(tmp_path_factory.mktemp("encoders") / "clip_l.safetensors")
