"""What a run does when it is asked to stop: signals."""

import os
import signal
import time

import torch.distributed as dist


class StopRequest:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the loop to save and stop at the end of its step; a second one ends at
    once.

    torchrun passes on to its workers what a cluster may have sent them already; under it, what comes within
    REPEAT seconds of the first is taken for a repetition. A terminal that is closed sends SIGHUP more than once, so
    that is never a second one; where it is ignored, as nohup has it, it stays so (torchrun's workers get it all the
    same: torchrun's own handler takes the place of nohup's, and passes it on).
    """

    REPEAT = 5.0

    def __enter__(self):
        self.signal, self.since = 0, 0.0
        asking = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        self.before = {n: signal.signal(n, self._note) for n in asking}
        return self

    def __exit__(self, *error):
        for n, handler in self.before.items():
            signal.signal(n, handler)

    def _note(self, received, frame):
        under_torchrun = dist.is_available() and dist.is_torchelastic_launched()
        if not self.signal:
            self.signal, self.since = received, time.monotonic()
            if not under_torchrun:
                for n in self.before.keys() - {signal.SIGHUP}:
                    signal.signal(n, signal.SIG_DFL)
        elif received != signal.SIGHUP and time.monotonic() - self.since > self.REPEAT:
            signal.signal(received, signal.SIG_DFL)
            os.kill(os.getpid(), received)

    @property
    def exit_code(self) -> int:
        """128 + signal; where only another process got it, 128 + SIGTERM."""
        return 128 + (self.signal or signal.SIGTERM)
