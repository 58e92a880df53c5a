"""The first thing that a worker process does, before it imports torch."""

import multiprocessing
import os
import signal
import threading


def begin_worker() -> None:
    """Gives torch one thread; a worker whose parent is killed ends too, so that nobody else writes to its run; and
    Ctrl-C, which all processes get, ends it without a word but where `distill` heeds it: the parent has the word.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    import torch

    torch.set_num_threads(1)
