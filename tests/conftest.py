import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the other core is for stress.py

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it starts behind itself

import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from ct import phantom, pool  # noqa: E402
from ct.volumes import BadInput  # noqa: E402
from engine import figures, pace  # noqa: E402

STRESS = pytest.StashKey()
TABLE = "STRESS_TABLE"  # the variable that names the file in which stress.py's table will be


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "stress_table" in getattr(item, "fixturenames", ()))  # these come last


def _start_stress(config) -> None:
    """The short forms of stress.py take minutes: they run beside the other tests."""
    folder = tempfile.mkdtemp(prefix="stress-")
    os.environ[TABLE] = f"{folder}/table"
    command = ["sh", "-c", 'cd "$0" && "$@" > out 2> err; mv out table', folder, sys.executable,
               Path(__file__).parent / "stress.py", "--short", "--kills", "6", "--files", "300", "--only", "files",
               "kills", "signals", "terminal", "processes", "disk", "restarts", "rejoin"]
    config.stash[STRESS] = subprocess.Popen(command, start_new_session=True)


def pytest_sessionstart(session):
    if getattr(session.config.option, "numprocesses", None) and TABLE not in os.environ:  # before its workers start
        _start_stress(session.config)


def pytest_collection_finish(session):
    needed = any("stress_table" in getattr(item, "fixturenames", ()) for item in session.items)
    if needed and TABLE not in os.environ and not session.config.option.collectonly:
        _start_stress(session.config)


def pytest_sessionfinish(session):
    if stress := session.config.stash.get(STRESS, None):
        if stress.poll() is None:  # the tests were stopped, or failed before they asked for its table
            os.killpg(stress.pid, 9)
        shutil.rmtree(Path(os.environ.pop(TABLE)).parent, ignore_errors=True)


@pytest.fixture(scope="session")
def stress_table() -> tuple[list[str], str]:
    """(lines of the table that stress.py prints, its stderr) for its short forms: 3 kills a script, 300 files."""
    table = Path(os.environ[TABLE])
    while not table.exists():  # it notices itself what hangs
        time.sleep(0.2)
    out, err = table.read_text(), table.with_name("err").read_text()
    assert "| what | tried | how it ended |" in out, err
    return out.splitlines(), err


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of small real CT volumes that the environment variable REAL_CT names."""
    folder = os.environ.get("REAL_CT", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_CT does not name a folder of real CT volumes")
    return Path(folder)


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory) -> Path:
    """A phantom small enough to train on in seconds: all 30 labelled cases and 6 unlabelled ones."""
    folder = tmp_path_factory.mktemp("phantom") / "phantom"
    phantom.write(folder, unlabelled=6, shape=(4, 64, 64))
    return folder


@pytest.fixture(scope="session", autouse=True)
def drawing():
    """What draws, which takes a second or two of every run, those of fixtures too: no test has it but by its mark."""
    with pytest.MonkeyPatch.context() as patch:
        attempt = figures.attempt
        patch.setattr(figures, "attempt", lambda *_: False)
        yield attempt


def in_this_process(work, items, workers, title, unit="volume"):
    """As `pool.in_processes`, without its processes."""
    for item in items:
        try:
            yield item, work(item)
        except BadInput as e:
            yield item, e


@pytest.fixture(scope="session", autouse=True)
def processes_of_a_pool():
    """What works in processes of its own: each is a fork of one that holds torch, at a tenth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        several = pool.in_processes
        patch.setattr(pool, "in_processes", in_this_process)
        yield several


@pytest.fixture(autouse=True)
def processes_where_marked(request, monkeypatch, processes_of_a_pool):
    """Forked where a test is marked `pool`, and in each command that a test starts as a process."""
    if request.node.get_closest_marker("pool"):
        monkeypatch.setattr(pool, "in_processes", processes_of_a_pool)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch, drawing):
    """Drawn where a test is marked `pictures`."""
    if request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(figures, "attempt", drawing)


@pytest.fixture(scope="module")
def small_networks():
    """--arch takes the networks of narrow.py: a step takes a tenth of a ResNet-18's, a checkpoint a hundredth."""
    import narrow

    with pytest.MonkeyPatch.context() as patch:
        narrow.register(patch)
        yield


@pytest.fixture
def arch(request) -> tuple[str, ...]:
    """The flags with which a test marked `narrow` runs a command on a network of narrow.py; none for the others."""
    if request.node.get_closest_marker("narrow") is None:
        return ()
    request.getfixturevalue("small_networks")
    return "--arch", "resnet_basic"


@pytest.fixture
def by_clock(monkeypatch):
    """by_clock(trainer class, seconds, peak, operations): by the clock of engine/pace.py its steps take so long each,
    on a device of this peak, and each call that is counted has so many operations.
    """

    def set_clock(trainer: type, seconds: float, peak: float, operations: float) -> None:
        clock, step = [900.0], trainer.step

        def slow(self, t, batch):
            clock[0] += seconds
            return step(self, t, batch)

        monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        monkeypatch.setattr(trainer, "step", slow)
        monkeypatch.setattr(pace, "peak", lambda device, amp: peak)
        monkeypatch.setattr(pace, "operations", lambda network, call: operations)

    return set_clock


@pytest.fixture
def memory_of_nan():
    """What is allocated and not filled holds NaN, of whole numbers their greatest: torch's own doing, on request."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2).isnan().all() and torch.empty(2, dtype=torch.int64).min() > 2**62
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def refusal(capsys):
    """refusal(main, argv) -> the one line on stderr with which main(argv) ends; its exit code is not zero."""

    def run(main, argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in argv])
        assert caught.value.code not in (0, None)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines() or [str(caught.value.code)]
        assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
        return lines[0]

    return run


class Waits(TorchDispatchMode):
    """What makes the host wait for a GPU: copies from or to it that are not from pinned memory and non-blocking."""

    def __init__(self):
        super().__init__()
        self.found, self.copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, free = args[name == "copy_"], (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if source.device.type != out.device.type:
                self.copies += 1
                if not (free and getattr(source, "pinned", False)):
                    self.found.append((name, tuple(source.shape), source.device.type, out.device.type))
        return out


@pytest.fixture
def fakes_of_today():
    """Skip a test of tensors without content where torch is too old for it: CUDA's ask for a GPU, operations differ."""
    if torch.__version__.startswith(("2.6.", "2.7.")):
        pytest.skip("tensors without content of this version of torch ask for a GPU's driver, or count otherwise")


@pytest.fixture
def fake_gpu(monkeypatch, fakes_of_today):
    """(its device, Waits): CUDA tensors without content or a GPU. `.item()` and what else depends on values raises.

    Memory is marked as pinned instead of pinned; a backward, which needs a real device, is left out.
    """

    def pin(tensor):
        tensor = tensor.view_as(tensor)
        tensor.pinned = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # autocast as there
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # real weights become fake ones
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0), Waits
    torch.__future__.set_overwrite_module_params_on_conversion(False)
