"""Fixtures over a real ComfyUI; without one every host test is skipped with how to get one."""

import contextlib
import json
import shutil
import zipfile

import pytest

from demo import server as instance
from demo.in_comfyui import add_toy

HOST = instance.find_host()
FRIEND = "https://friend.example"  # whose pages may ask the other server
OPEN = pytest.StashKey()  # the browser window of this session, once there is one


def pytest_collection_modifyitems(items):
    if HOST is None:
        for item in items:
            if "tests/host/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=instance.HOW_TO))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A page in which a test failed is loaded anew for the next one."""
    report = yield
    if report.failed and OPEN in item.session.stash and "page" in item.fixturenames:
        item.session.stash[OPEN].spoil()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """The page is left while other modules are at work that have no use for it."""
    over = nextitem and nextitem.module is not item.module and "page" not in nextitem.fixturenames
    if over and OPEN in item.session.stash:
        item.session.stash[OPEN].rest()
    return (yield)


@pytest.fixture(scope="session")
def server(tmp_path_factory, clip_file):
    """The one server that all tests share, with everything in its folders that any of them needs.

    Its trainer is the real one; a module that plays the fake one asks for `fake` as well. One thread: on a busy machine
    the threads of so small a model wait for each other longer than they compute.
    """
    from tests.host import training

    folder = tmp_path_factory.mktemp("host")
    base = training.make_base(folder, clip_file, training.write_vae(folder / "ae.safetensors"))
    add_toy(base)
    with training.TrainingServer(HOST, base, {"OMP_NUM_THREADS": "1"}) as running:
        running.patience = 400.0  # a training starts Python, torch and diffusers twice
        yield running
        assert not training.children(running)


@pytest.fixture(scope="session")
def living_other(server):
    """() -> another ComfyUI over the same folders, started where there is none or a test has killed it."""
    from tests.host.training import TrainingServer

    log, arguments = server.log.with_name("other.log"), ("--enable-cors-header", FRIEND)
    started = []
    with contextlib.ExitStack() as ends:

        def living():
            if not started or started[-1].process.poll() is not None:
                one = TrainingServer(HOST, server.base, {"OMP_NUM_THREADS": "1"}, log, arguments)
                started.append(ends.enter_context(one))
            return started[-1]

        yield living


@pytest.fixture
def other(living_other):
    """Another ComfyUI over the same folders, which allows the pages of a friend."""
    return living_other()


@pytest.fixture(scope="session")
def bare_server(tmp_path_factory):
    """A server whose Python has none of the packages that the pack can do without, and whose pack is that of the
    registry's archive, where this is a clone that an archive can be made of. Everybody's pages may ask it.
    """
    from tests.archive import archived_files, make_archive

    folder = tmp_path_factory.mktemp("bare")
    base = instance.make_base(folder / "base")
    with contextlib.suppress(FileNotFoundError):
        archived_files()
        installed = base / "custom_nodes" / "qr-lora"
        installed.unlink() if installed.is_symlink() else shutil.rmtree(installed)
        with zipfile.ZipFile(make_archive(folder / "node.zip")) as archive:
            archive.extractall(installed)
    (folder / "sitecustomize.py").write_text(
        "import sys\nfor name in ('diffusers', 'accelerate', 'peft', 'matplotlib'):\n    sys.modules[name] = None\n"
    )
    environment = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with instance.Server(HOST, base, environment, arguments=("--enable-cors-header",)) as running:
        yield running


@pytest.fixture
def fake(server):
    """The fake trainer, which does as it should unless the test plays another scenario; afterwards the real one."""
    server.play("ok")
    yield server
    server.train_really()


@pytest.fixture(scope="session")
def chromium(server, tmp_path_factory, request):
    """The one browser window that all tests share."""
    from tests.host import browser

    with browser.browser(server, tmp_path_factory.mktemp("chromium")) as window:
        request.session.stash[OPEN] = window
        yield window
        del request.session.stash[OPEN]


@pytest.fixture(scope="module")
def page(chromium, request):
    """The window in the size that the module's WINDOW asks for, without what earlier tests left in its console."""
    chromium.driver.set_window_size(*getattr(request.module, "WINDOW", (1500, 1500)))
    chromium.errors()
    return chromium


@pytest.fixture(scope="session")
def host_python():
    """Host -> its Python, with the packages that it takes long to import."""
    from tests.host.warm_python import WarmPython

    warm = {}

    def python_of(host):
        name = instance.interpreter(host)
        return warm.setdefault(name, WarmPython(name))

    yield python_of
    for one in warm.values():
        one.end()


@pytest.fixture(scope="session")
def run_probe(host_python, tmp_path_factory):
    """(script beside this file, host) -> what it found out in a process of the host: check name -> numbers."""

    def run(script, host=HOST):
        base = instance.make_base(tmp_path_factory.mktemp("probe") / "base")
        script = instance.PACK / "tests" / "host" / script
        done = host_python(host).run([script, host, base, base / "result.json"], host)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((base / "result.json").read_text())

    return run


@pytest.fixture(scope="session")
def probe(run_probe):
    """What probe.py found out."""
    return run_probe("probe.py")


@pytest.fixture(scope="session")
def live_probe(run_probe):
    """What live_probe.py found out."""
    return run_probe("live_probe.py")


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    from tests.host.training import write_clip_l

    return write_clip_l(tmp_path_factory.mktemp("encoders") / "clip_l.safetensors")
