"""engine/: atomic checkpoints, the run folder, precision, backbones from files."""

import errno
import functools
import importlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchvision.models import resnet18

from ct import command as ct_command
from ct import files
from ct.volumes import BadInput
from engine import backbones, launch, processes, runs, seeds, signals
from engine.runs import Run


def run(tmp_path, config=None, overwrite=False):
    return Run(tmp_path / "run", config or {"lr": 0.1}, overwrite, True)


@pytest.mark.parametrize("script, more", [("train_seg", {"protocol": "linear-frozen"}), ("train_ssl", {})])
def test_a_refusal_names_flags_that_its_command_has(tmp_path, monkeypatch, capsys, script, more):
    """--name makes another run of train_ssl.py; a segmentation run has the name that its settings give it."""
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse(["--help"])
    offered, refusals = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)), []
    run(tmp_path, {"lr": 0.1, **more}).lock.close()

    def locked(file):
        raise BlockingIOError

    for hinder in (lambda: None, lambda: monkeypatch.setattr(runs, "lock", locked)):
        hinder()
        with pytest.raises(BadInput) as caught:
            run(tmp_path, {"lr": 0.2, **more})
        refusals.append(set(re.findall(r"--[a-z-]+", str(caught.value))))
    assert refusals[0] >= {"--overwrite"} and all(refusals) and not set.union(*refusals) - offered


def test_config_must_agree_and_overwrite_starts_over(tmp_path):
    first = run(tmp_path)
    first.checkpoint({"step": 3})
    first.log([{"step": 3}])
    first.lock.close()
    with pytest.raises(BadInput, match="lr: 0.1 there, 0.2 here"):
        run(tmp_path, {"lr": 0.2})
    again = run(tmp_path, {"lr": 0.2}, overwrite=True)
    assert again.resume() is None and json.loads((tmp_path / "run/config.json").read_text()) == {"lr": 0.2}


def test_a_long_difference_is_cut_short(tmp_path):
    run(tmp_path, {"lr": 0.1, "store": {f"{i:04d}": "a" for i in range(30)}}).lock.close()
    with pytest.raises(BadInput, match=r"lr: 0.1 there, 0.2 here; store.0000: a there, .*; and 23 more\)") as told:
        run(tmp_path, {"lr": 0.2, "store": {f"{i:04d}": "b" for i in range(30)}})
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


def test_a_run_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    run(tmp_path).checkpoint({"step": 1})
    assert f"{tmp_path / 'run'}: no locks on this file system" in capsys.readouterr().err
    assert run(tmp_path).resume()["step"] == 1


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    r = run(tmp_path)
    r.log([{"step": s, "loss": s / 2} for s in (1, 2)])
    r.checkpoint({"step": 2})
    r.log([{"step": s, "loss": s / 2} for s in (3, 4)])
    with open(r.folder / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    assert r.resume()["step"] == 2
    assert [x["step"] for x in runs.read_log(r.folder / "log.jsonl")] == [1, 2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys):
    r = run(tmp_path)
    r.checkpoint({"step": 1, "x": torch.ones(1000)})
    r.checkpoint({"step": 2, "x": torch.ones(1000)})
    raw = r.path.read_bytes()
    r.path.write_bytes(raw[: len(raw) // 2])
    assert r.resume()["step"] == 1 and "checkpoint.pt" in capsys.readouterr().err
    r.previous.write_bytes(b"")
    with pytest.raises(BadInput, match="--overwrite"):
        r.resume()


def test_a_flipped_bit_is_found_and_the_damaged_file_never_replaces_the_good_one(tmp_path, capsys):
    r = run(tmp_path)
    for step in (1, 2):
        r.checkpoint({"step": step, "x": torch.ones(1000)})
    raw = bytearray(r.path.read_bytes())
    raw[raw.find(torch.ones(9).numpy().tobytes()) + 400] ^= 1  # inside the tensor, where torch.load does not look
    r.path.write_bytes(raw)
    assert r.resume()["step"] == 1 and "checksum" in capsys.readouterr().err
    assert r.damaged.exists() and not r.path.exists()
    r.checkpoint({"step": 2, "x": torch.ones(1000)})
    assert runs.load(r.path)["step"] == 2 and runs.load(r.previous)["step"] == 1


@pytest.mark.parametrize("killed", ["before", "between"])
def test_a_kill_around_the_two_renames_loses_nothing(tmp_path, monkeypatch, killed):
    r = run(tmp_path)
    r.checkpoint({"step": 1})
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(str(b))
        if len(calls) == (2 if killed == "before" else 3):  # the first one ends the writing of checkpoint.next.pt
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        r.checkpoint({"step": 2})
    monkeypatch.undo()
    r.lock.close()
    (r.folder / ".backbone.pth.part").write_bytes(b"half of it")  # what a kill while writing leaves
    again = run(tmp_path)
    assert again.resume()["step"] == 2 and runs.load(again.previous)["step"] == 1
    assert not [p for p in again.folder.iterdir() if p.name.endswith(".part") or "next" in p.name]


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    r = run(tmp_path)
    r.checkpoint({"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: r.checkpoint({"step": 2}), lambda: r.log([{"step": 2}]),
                  lambda: runs.write_text(tmp_path / "a.json", "{}")):
        with pytest.raises(BadInput, match="cannot be written .No space left on device.; make room"):
            write()
    assert runs.load(r.path)["step"] == 1 and not (tmp_path / "a.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    r = run(tmp_path)
    r.checkpoint({"step": 1, "model": {"w": torch.ones(2)}})
    with pytest.raises(BadInput, match="step 2: weights that are not finite; the last good checkpoint is .*point.pt"):
        r.checkpoint({"step": 2, "optimizer": {"state": [{"m": torch.tensor([1.0, torch.inf])}]}})
    assert r.resume()["step"] == 1


def test_another_precision_or_number_of_threads_is_announced(capsys):
    here = processes.Processes(0, 1, torch.device("cpu"))
    saved = {"amp": "bf16", "threads": torch.get_num_threads()}
    runs.announce_changes(saved, "bf16", here)
    assert capsys.readouterr().err == ""
    runs.announce_changes(saved | {"threads": 77}, "off", here)
    told = capsys.readouterr().err
    assert "precision was bf16 and is off" in told and "threads here, 77 before" in told


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """As of one report.md: each write is whole, none fails, nothing else is left."""
    path, texts = tmp_path / "report.md", [letter * 20_000 for letter in "abc"]

    def write(text):
        for _ in range(40):
            with runs.whole(path) as f:
                f.write(text[:10_000].encode())
                f.write(text[10_000:].encode())
            assert path.read_text() in texts

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for done in [pool.submit(write, text) for text in texts]:
            done.result(timeout=60)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("write", [lambda p: runs.write_text(p, "new"), lambda p: files.write_json(p, "new")])
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path, write):
    """What one at work has, on this machine or on another, stays."""
    path, (held, ready) = tmp_path / "report.[md]", os.pipe()

    def child():
        if pid := os.fork():
            os.read(held, 1)
            return pid
        try:
            with files.replacing(path) as part:
                part.write_text("half")
                os.write(ready, b"x")
                time.sleep(600)
        finally:
            os._exit(1)

    def end(pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    end(killed := child())
    at_work = child()
    try:
        (mine,) = (p for p in tmp_path.iterdir() if f"-{at_work}-" in p.name)
        elsewhere, old = (tmp_path / f".part-0000000{n}-1-00000000.report.[md]" for n in (1, 2))
        for part in (elsewhere, old):
            part.touch()
        os.utime(old, (time.time() - 3 * 24 * 3600,) * 2)
        write(path)
        left = {*tmp_path.iterdir()}
    finally:
        end(at_work)
    assert left == {path, mine, elsewhere} and not [p for p in left if f"-{killed}-" in p.name]
    write(path)
    files.remove_parts(tmp_path)  # of a folder that is locked
    assert {*tmp_path.iterdir()} == {path}


def test_half_lines_stay_alone(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(b'{"a": 1}\n{"a": 2, "b')
    runs.append(tmp_path / "results.jsonl", [{"a": 3}])
    assert [r["a"] for r in runs.read_log(tmp_path / "results.jsonl")] == [1, 3]


def test_under_torchrun_a_repeated_signal_is_one_signal(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(signals.StopRequest, "REPEAT", 600.0)  # on a slow machine, too
    with signals.StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.signal == signal.SIGTERM and stop.exit_code == 143


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("torchrun", [False, True])
def test_signals_ask_to_save_and_stop(monkeypatch, request, number, torchrun):
    """And a terminal that is closed says so more than once: by the kernel and by the shell, then by torchrun."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(signals.StopRequest, "REPEAT", 0.0)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGHUP, signal.getsignal(signal.SIGHUP)))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though the tests may run under nohup
    before = [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with signals.StopRequest() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), number)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == number and stop.exit_code == 128 + number
        if not torchrun:  # a second one ends at once, in the middle of a step too
            others = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
            assert {signal.getsignal(n) for n in others} == {signal.SIG_DFL}
    assert [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def test_nohups_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == 0
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_outside_the_loop_is_one_line(capsys):
    @launch.command
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("this must not run",))

    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="x.pt"):
        runs.load(tmp_path / "x.pt")
    torch.save({"a": Evil()}, tmp_path / "y.pt")
    with pytest.raises(BadInput, match="more than tensors"):
        runs.load(tmp_path / "y.pt")


def test_streams_of_random_numbers_differ_by_seed_purpose_and_step():
    drawn = {seeds.rng(s, p, t).random() for s in (0, 1) for p in (0, 1) for t in (0, 1)}
    assert len(drawn) == 8 and seeds.rng(1, 0, 0).random() == seeds.rng(1, 0, 0).random()


def test_non_finite_losses_name_step_and_slices(tmp_path):
    r = run(tmp_path)
    records = [{"step": 4, "loss": 1.0}, {"step": 5, "loss": math.nan}]
    with pytest.raises(BadInput, match="step 5.*Case_7 slice 3.*no checkpoint"):
        runs.refuse_non_finite(records, lambda step: ["Case_7 slice 3"], r)


def test_backbones_from_files(tmp_path, capsys):
    net = resnet18(weights=None)
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.encoder_q.{k}": v for k, v in net.state_dict().items()}
                | {"module.queue": torch.ones(3)}}, tmp_path / "moco.pth")
    for name in ("plain", "moco"):
        loaded = backbones.build_backbone(str(tmp_path / f"{name}.pth"), "resnet18")
        for (k, a), b in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert k.startswith("fc.") or torch.equal(a, b)
    assert "matched" in capsys.readouterr().out
    for arch in ("resnet34", "resnet50"):
        with pytest.raises(BadInput, match=f"plain.pth: not a backbone of architecture {arch}"):
            backbones.build_backbone(str(tmp_path / "plain.pth"), arch)
    with pytest.raises(BadInput, match="no such file"):
        backbones.build_backbone(str(tmp_path / "none.pth"), "resnet18")
    with pytest.raises(BadInput, match="--arch vgg16"):
        backbones.build_backbone("random", "vgg16")


def test_a_failed_download_names_the_choices(tmp_path, monkeypatch):
    def offline(*args, **kw):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(BadInput, match=f"fetch https://.*resnet18-f37072fd.pth elsewhere and put it at {tmp_path}"):
        backbones.build_backbone("imagenet", "resnet18")


def test_the_makefiles_torchrun_adds_no_traceback_to_a_line_that_says_why(tmp_path):
    """With stand-ins for torch's modules: a script that ended by itself, and one that was killed and said nothing."""
    root, torch_dir = Path(__file__).parent.parent, tmp_path / "torch/distributed"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / ".venv/bin/python").symlink_to("/bin/true")
    subprocess.run(["make", "-s", "setup", "PYTHON=true"], cwd=tmp_path, check=True, capture_output=True)
    (torch_dir / "elastic/multiprocessing").mkdir(parents=True)
    for package in (torch_dir.parent, torch_dir, torch_dir / "elastic", torch_dir / "elastic/multiprocessing"):
        (package / "__init__.py").touch()
    (torch_dir / "elastic/multiprocessing/errors.py").write_text(
        "class ChildFailedError(Exception):\n    def get_first_failure(self):\n        return 0, self.args[1]\n")
    (torch_dir / "run.py").write_text(
        "import sys\nfrom types import SimpleNamespace\n"
        "from torch.distributed.elastic.multiprocessing.errors import ChildFailedError\n"
        "get_args_parser = None\ndef main():\n    code = int(sys.argv[1])\n    if code:\n"
        "        raise ChildFailedError('killed', SimpleNamespace(exitcode=code))\n")
    for code, ended, says in ((0, 0, ""), (1, 1, ""), (143, 1, ""), (-9, 1, "killed")):
        told = subprocess.run([sys.executable, tmp_path / ".venv/bin/torchrun", str(code)], capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert told.returncode == ended and "Traceback" not in told.stderr and says in told.stderr
        assert bool(told.stderr) == bool(says)


@pytest.fixture
def agent_store():
    """The store that torchrun keeps through the restarts of its processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def started(store, ranks, world, **more):
    """The tokens that `processes.agree` gives to these ranks, each in a thread with a client of its own."""
    def one(rank):
        return processes.agree(dist.TCPStore("127.0.0.1", store.port, is_master=False), rank, world, **more)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(one, rank) for rank in ranks]]


def test_all_processes_of_a_start_agree_on_a_token_that_no_earlier_start_had(agent_store):
    """Whatever earlier starts left in the store, and also names of processes that died before they had agreed."""
    tokens = [started(agent_store, range(3), 3) for _ in range(3)]
    assert all(len(set(start)) == 1 for start in tokens) and len({start[0] for start in tokens}) == 3
    agent_store.set("name/1", "a process that died")
    agent_store.set("name/2", "another one")
    late = threading.Timer(0.5, lambda: tokens.append(started(agent_store, [2], 3)))
    late.start()
    early = started(agent_store, [0, 1], 3)
    late.join()
    assert len({*early, *tokens[-1]}) == 1 and early[0] not in {start[0] for start in tokens[:-1]}
    assert len(set(started(agent_store, range(2), 2))) == 1  # and with another number of processes


def test_a_start_that_waits_says_for_whom(agent_store, monkeypatch, capsys):
    times = iter(range(0, 10_000, 6))
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=30))
    with pytest.raises(BadInput, match="process 0 waited .* torchruns of all nodes"):
        processes.agree(agent_store, 0, 3, poll=0)
    assert capsys.readouterr().err == "process 0: waiting for processes 1, 2 of 3 to start\n"


def test_a_restart_under_torchrun_does_not_overwrite_again(tmp_path, monkeypatch, agent_store):
    def opened(overwrite=True):
        run = Run(tmp_path / "run", {}, overwrite, True)
        there = (tmp_path / "run/backbone.pth").exists()
        (tmp_path / "run/backbone.pth").touch()
        run.lock.close()
        return there

    opened()
    assert not opened() and opened(overwrite=False)  # without torchrun each start overwrites
    for name, value in (("USE_AGENT_STORE", "True"), ("RUN_ID", "r"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent_store.port))
    assert not opened() and opened() and opened()  # the count of restarts is each machine's own: 0 here
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # another launch
    monkeypatch.setenv("MASTER_PORT", str(other.port))
    assert not opened() and opened()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not opened()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert opened()


def test_of_several_processes_each_says_what_it_found_itself(monkeypatch, capsys):
    def told(error, rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(SystemExit):
            ct_command.command(lambda argv: (_ for _ in ()).throw(error))([])
        return capsys.readouterr().err

    monkeypatch.setenv("WORLD_SIZE", "4")
    own, relayed = BadInput("scan.nii: damaged"), BadInput("config: differs")
    relayed.relayed = True
    assert "process 3: scan.nii: damaged" in told(own, 3) and "process 0: scan.nii: damaged" in told(own, 0)
    assert "config: differs" in told(relayed, 0) and told(relayed, 3) == ""
    with pytest.raises(BadInput) as caught:
        processes.on_main(True, lambda: (_ for _ in ()).throw(BadInput("x")))
    assert caught.value.relayed
