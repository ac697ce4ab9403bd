"""What a step computes, counted: on a GPU each of these is at least one launch."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views and what only allocates; a foreach operation is one."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func.overloadpacket.__name__ in ALLOCATE):
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
