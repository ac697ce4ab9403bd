"""The run folder: files that are whole or absent, checkpoints, the log, and what makes a run go on or stop."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import sys
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ct.files import lock, remove_parts, replacing
from ct.volumes import BadInput
from engine import processes
from engine.processes import Processes, on_main

SHOWN = 8  # differing settings that a refusal names
# settings that older configs do not name, as they were: of pre-training, of segmentation
SINCE, SINCE_SEGMENTATION = {"recipe": "paper", "weight_decay": 1e-4, "every": 1}, {"flip": True}
RECORDED = ("start", "normalisation")  # what older configs do not tell, and nothing is compared with
# The tensors of a Lightning file, a dict with arguments or a whole module: what `load` reads. FILE and NEW follow.
SAVE_ALONE = ("python -c \"import sys, torch; f, new = sys.argv[1:]; x = torch.load(f, 'cpu', weights_only=False); "
              "torch.save({k: x[k] for k in ('state_dict', 'model', 'teacher', 'student', 'backbone') if k in x} "
              "if isinstance(x, dict) else x.state_dict(), new)\"")


def _unwritable(path: Path, e: OSError, flag: str = "another --out") -> BadInput:
    mend = "make room there" if e.errno in (errno.ENOSPC, errno.EDQUOT) else f"give {flag}, or mend that"
    return BadInput(f"{path}: cannot be written ({e.strerror}); {mend} and run the same command again")


@contextlib.contextmanager
def whole(path: Path):
    """A file that appears at `path` whole or not at all: written beside it, flushed to disk, renamed."""
    try:
        with replacing(path) as part, open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch's zip writer hides it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise _unwritable(path, cause) from None


def save(value: object, path: Path) -> None:
    """torch.save, whole or not at all. Raises BadInput when the disk is full or not writable."""
    with whole(path) as f:
        torch.save(value, f)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all. Raises BadInput when the disk is full or not writable."""
    with whole(path) as f:
        f.write(text.encode(errors="surrogateescape"))  # names of files may hold bytes that are no text


def append(path: Path, records: list[dict], flag: str = "another --out") -> None:
    """Add JSON lines to a file, on disk when this returns. Raises BadInput when the disk is full or not writable.

    flag: what moves the file elsewhere.
    """
    try:
        with open(path, "ab+") as f:
            if f.tell():
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":
                    f.write(b"\n")  # a line that a crash cut short stays alone
            f.write("".join(json.dumps(r) + "\n" for r in records).encode())
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise _unwritable(path, e, flag) from None


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl file; what a crash cut short is left out."""
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict)]


def read_json(path: Path, *keys: str, remedy: str) -> dict:
    """A JSON object with these keys. Raises BadInput, with the remedy, where it is missing, damaged or lacks one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: is missing; {remedy}") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError:
        raise BadInput(f"{path}: damaged; {remedy}") from None
    if not isinstance(value, dict) or (lacking := [k for k in keys if k not in value]):
        raise BadInput(f"{path}: damaged ({f'it lacks {lacking[0]}' if isinstance(value, dict) else 'no object'}); "
                       f"{remedy}")
    return value


def read_config(folder: Path, *keys: str) -> dict:
    """The settings of the run in a folder. Raises BadInput where config.json is missing, damaged or lacks a key."""
    return read_json(folder / "config.json", *keys, remedy="start that run over with --overwrite, or remove its folder")


def load(path: Path, device: str | torch.device = "cpu"):
    """torch.load of tensors and plain values only.

    Raises BadInput for a file that is missing, unreadable, damaged (its checksums are verified, which torch.load
    alone does not do) or holds code.
    """
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes since 1.6
            with zipfile.ZipFile(path) as z:
                if z.testzip():
                    raise BadInput(f"{path}: cannot be loaded (damaged: a checksum differs)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles: they load, or the error says why not
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as e:
        raise BadInput(f"{path}: cannot be read ({e.strerror or e})") from None
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # zip, pickle and unpickling errors have no common base
        if "weights_only" not in str(e).lower():
            raise BadInput(f"{path}: cannot be loaded (damaged or no PyTorch file)") from None
        alone = Path(path).with_suffix(".weights.pth")
        raise BadInput(f"{path}: cannot be loaded (it holds more than tensors; save its state_dict alone, if you trust "
                       f"the file, whose code this runs: {SAVE_ALONE} {shlex.quote(str(path))} "
                       f"{shlex.quote(str(alone))})") from None


class Run:
    """One run folder: config.json, log.jsonl, checkpoint.pt and the one before it. Only the main process writes.

    The same command continues it; a differing config is refused with the difference. While it is open, a
    second run on the folder is refused (the lock goes with the process, however it ends). Constructor and
    methods are called by all processes together: what one raises, all raise.
    """

    def __init__(self, folder: Path, config: dict, overwrite: bool, main: bool):
        self.folder, self.main = folder, main
        self.flag = "--out" if "protocol" in config else "--name"  # of train_seg.py and train_ssl.py: makes another run
        self.path, self.previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        self.saved = time.monotonic()  # or begun, before the first checkpoint
        self.next, self.damaged = folder / "checkpoint.next.pt", folder / "checkpoint.damaged.pt"
        on_main(main, lambda: self._open(config, overwrite))

    def _open(self, config: dict, overwrite: bool) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "w")  # noqa: SIM115 (held as long as the run)
            lock(self.lock)
        except (BlockingIOError, PermissionError) as e:
            if e.filename:
                raise BadInput(f"{e.filename}: cannot be written ({e.strerror}); give another --out") from None
            raise BadInput(f"{folder}: another run is at work there; wait for it or give another {self.flag}") from None
        except OSError as e:
            raise BadInput(f"{folder}: cannot be written or locked ({e.strerror}); give another --out") from None
        remove_parts(folder)
        once = f"overwrite {folder.resolve()}"  # a restart of the processes goes on with what they began
        if overwrite and not processes.done_in_this_launch(once):
            for name in ("config.json", "log.jsonl", "validation.jsonl", "backbone.pth", "result.json", "dice.csv",
                         self.next.name, self.path.name, self.previous.name, self.damaged.name, "curves.png",
                         "validation.png", "overlays.png"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "predictions", ignore_errors=True)
            processes.done_in_this_launch(once, mark=True)
        if any(path.exists() for path in (folder / "config.json", self.path, self.previous, self.next)):
            self._compare(config)  # a checkpoint whose settings no one knows is refused there
        else:
            write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _compare(self, new: dict) -> None:
        if differing := differences(self.folder, new):
            raise BadInput(f"{self.folder}: was started with other settings ({differing}); give the same ones, another "
                           f"{self.flag}, or --overwrite")

    def resume(self) -> dict | None:
        """The newest whole checkpoint, or None, on every process; the log is cut back to its step."""
        return on_main(self.main, self._resume)

    def _resume(self) -> dict | None:
        self._rotate()
        state = None
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state, loaded = load(path), path
                break
            except BadInput as e:
                print(f"{e}; going back to the checkpoint before it", file=sys.stderr)
        if state is None and (self.path.exists() or self.previous.exists()):
            raise BadInput(f"{self.folder}: no checkpoint there can be loaded; start over with --overwrite")
        if state and loaded == self.previous and self.path.exists():
            os.replace(self.path, self.damaged)  # out of the way: it must not take the good one's place
        log = self.folder / "log.jsonl"
        if log.exists():
            records = [r for r in read_log(log) if state and r["step"] <= state["step"]]
            write_text(log, "".join(json.dumps(r) + "\n" for r in records))
        return state

    def checkpoint(self, state: dict) -> None:
        """Save; the one before stays as checkpoint.previous.pt. Raises BadInput: full disk, weights not finite."""
        on_main(self.main, lambda: self._checkpoint(state))
        self.saved = time.monotonic()

    def overdue(self, minutes: float) -> bool:
        """Whether the last checkpoint was so long ago, by this process's clock."""
        return time.monotonic() - self.saved >= 60 * minutes

    def _checkpoint(self, state: dict) -> None:
        if not all(t.isfinite().all() for _, t in tensors_in(state)):
            raise BadInput(f"step {state['step']}: weights that are not finite; {self.last_good()}")
        save(state, self.next)
        self._rotate()

    def _rotate(self) -> None:
        """checkpoint.next.pt, which is whole, becomes checkpoint.pt; after a kill in between, at the next start."""
        if self.next.exists():
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self.next, self.path)

    def last_good(self) -> str:
        """Where to go back to, in words."""
        return f"the last good checkpoint is {self.path}" if self.path.exists() else "no checkpoint was saved yet"

    def log(self, records: list[dict]) -> None:
        """Add lines to log.jsonl."""
        if records:
            on_main(self.main, lambda: append(self.folder / "log.jsonl", records))


def differences(folder: Path, new: dict) -> str:
    """Where the config of a run in `folder` is another than this one: `lr: 0.1 there, 0.2 here; ...`, or nothing."""
    old, new = read_config(folder), json.loads(json.dumps(new))
    old, new = (dict(flat({k: v for k, v in config.items() if k in old or k not in RECORDED})) for config in (old, new))
    old = {k: v for k, v in (SINCE | SINCE_SEGMENTATION).items() if k in new} | old
    differing = [f"{k}: {old.get(k)} there, {new.get(k)} here" for k in sorted({*old, *new})
                 if old.get(k) != new.get(k)]
    return "; ".join(differing[:SHOWN]) + f"; and {len(differing) - SHOWN} more" * (len(differing) > SHOWN)


def flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """A config's settings with those of its parts under their full names, part.setting."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, under their full names, part.tensor."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def sgd(trained: list[nn.Parameter], lr: float, momentum: float, weight_decay: float, amp: str) -> torch.optim.SGD:
    """The optimizer of both scripts; on a GPU in one kernel over all weights.

    Not under fp16: where its scaler skips the first step, torch's fused kernel leaves the momentum unset, and goes on
    with it.
    """
    fused = (trained[0].is_cuda and amp != "fp16") or None
    return torch.optim.SGD(trained, lr, momentum, weight_decay=weight_decay, fused=fused)


def load_optimizer(optimizer: torch.optim.SGD, state: dict) -> None:
    """Fill it from a checkpoint, which may come from another device: whether it is fused stays as it is here."""
    fused = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = fused


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients: one pass over them on their device, nothing to wait for. Not finite if one is not."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()


def refuse_non_finite(records: list[dict], slices_of, run: Run) -> None:
    """Raise BadInput at the first step whose loss or grad_norm is NaN or infinite, with its slices.

    A grad_norm of None is passed over: a step that fp16's scaler has skipped.
    """
    for r in records:
        for key, name in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            value = r.get(key)
            if value is not None and not np.isfinite(value):
                raise BadInput(f"step {r['step']}: the {name} is {value}; its slices: "
                               f"{', '.join(slices_of(r['step']))}; {run.last_good()}; lower --lr or try --amp off")


def announce_changes(saved: dict | None, amp: str, ranks: Processes) -> None:
    """Say where the precision or the number of threads is not the checkpoint's: both move the last digits."""
    if saved and saved["amp"] != amp and ranks.is_main:
        print(f"note: precision was {saved['amp']} and is {amp} from here on", file=sys.stderr)
    if saved and saved["threads"] != torch.get_num_threads() and ranks.is_main and ranks.device.type == "cpu":
        print(f"note: {torch.get_num_threads()} threads here, {saved['threads']} before; the last digits will move",
              file=sys.stderr)
