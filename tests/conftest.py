"""What every test shares: tiers, the published outputs, and hypothesis settings that a busy machine cannot fail."""

import subprocess

import pytest
from hypothesis import settings

from demo.small_flux import GOLDEN

# an example that is slow because the machine is busy is no failure; a failing one prints how to repeat it
settings.register_profile("pack", deadline=None, print_blob=True)
settings.load_profile("pack")

# tests of the host that do not ask the one server, which takes long to start
WITHOUT_SERVER = {
    f"tests/host/test_{name}.py" for name in ("benchmarks", "families", "live", "lora", "patching", "versions")
}

# tests of the host that open pages besides those that say so
IN_BROWSER = {f"tests/host/test_{name}.py" for name in ("block_presets", "blueprints", "minute", "socket_types")}

# tests that start no process and still take long: they train models, or draw pictures with them
TAKE_LONG = (
    "tests/fusion/",
    "tests/toy/",
    *(f"tests/train/test_{name}.py" for name in ("families", "pipelines", "streaming")),
)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="only tests that start no process and train little; a minute")


def pytest_collection_modifyitems(config, items):
    """The tests of the host all ask a server or a browser; the others that start a process carry the mark `process`.

    What takes longest comes first, so that several processes end at about the same time.
    """
    for item in items:
        if "tests/host/" in item.path.as_posix():
            item.add_marker(pytest.mark.process)
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("process") or takes_long(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    lengthy = {item.path for item in items if item.get_closest_marker("process") or takes_long(item)}
    rank = {"server": 0, "browser": 1}
    items.sort(key=lambda item: rank.get(scope_of(item.nodeid), 2 if item.path in lengthy else 3))


def takes_long(item):
    """Whether a test is of a file that trains models."""
    return item.path.relative_to(item.config.rootpath).as_posix().startswith(TAKE_LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Where several processes share the tests, a file stays in one of them. So do all files that ask the server, and
    those that ask it through a browser: two servers, each of which takes long to start, and no more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    return ByServer(config, log)


def scope_of(nodeid):
    """What stays in one process: the tests of the server, those of the browser, or any other file."""
    file = nodeid.split("::")[0]
    if not file.startswith("tests/host/") or file in WITHOUT_SERVER:
        return file
    return "browser" if file in IN_BROWSER or file.startswith("tests/host/test_browser") else "server"


@pytest.fixture(scope="session", autouse=True)
def no_process_in_the_quick_tier(request):
    """With --quick a test that starts a process fails: it would belong to the other tier."""
    if not request.config.getoption("--quick"):
        yield
        return

    class Refused(subprocess.Popen):
        def __init__(self, args, *rest, **more):
            name = str(args[0] if isinstance(args, list | tuple) else args)
            if "python" in name:  # not what a library asks the system for, such as the list of fonts
                raise AssertionError(f"started {args}: this test needs @pytest.mark.process")
            super().__init__(args, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Refused)
        yield


@pytest.fixture(scope="session")
def golden():
    """The folder of what the published code computed."""
    return GOLDEN
