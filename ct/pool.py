"""The same work on many volumes, in several processes."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from ct.command import cores
from ct.volumes import BadInput


def in_processes(work: Callable, items: list, workers: int | None, title: str,
                 unit: str = "volume") -> Iterator[tuple[object, object]]:
    """(item, work(item) or the BadInput it raised) for every item, in the order they finish.

    In `workers` processes, by default one a core, with a bar of `title`; what else work raises is raised here.
    """
    if not items:
        return
    # fork: a spawned process would import the calling script, and with it PyTorch, for nothing
    context = get_context("fork" if sys.platform == "linux" else None)
    workers = max(1, min(cores() if workers is None else workers, len(items)))
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in tqdm(as_completed(futures), title, len(items), unit=unit, disable=None):
                try:
                    yield futures[future], future.result()
                except BadInput as e:
                    yield futures[future], e
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker of a killed command must neither wait for work for ever nor write on beside the next one.

    Ctrl-C reaches all processes of a terminal: the parent answers it, a worker ends what it has in hand.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # at once: before anyone can see that the parent is gone
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
