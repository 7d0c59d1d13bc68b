"""The processes of one run, one to a GPU, as torchrun and accelerate launch start them. One process needs none of this.

Between `start` (TRL's own arguments start them, too) and `end` they can wait for each other and put things together.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


def count() -> int:
    """How many processes the launcher started; known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This one's number. 0 writes the files and prints."""
    return int(os.environ.get("RANK", 0))


def start() -> None:
    """Connect the processes, each with a GPU of its own where there are GPUs."""
    if count() == 1 or distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first to finish its share waits for the last one, whose answers may be longer: torch's 10 minutes are few.
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The launcher's variables, for who reads them (vLLM), also where there is no launcher and one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone |= {"MASTER_PORT": str(free.getsockname()[1])}
    missing = {name: value for name, value in alone.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        distributed.barrier()


@contextlib.contextmanager
def one_first(together: bool = False) -> Iterator[None]:
    """What stands in it is done by one process of each machine, then by the others, who find its work on the disk.

    together: by all at once, where none has a whole model.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first and not together:
        wait()
    yield
    if first and not together:
        wait()


def gathered(item: Any) -> list[Any]:
    """Every process's item (anything that pickles), by their numbers, on all of them."""
    if count() == 1:
        return [item]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, item)
    return found


def end() -> None:
    """Part them, when all have come this far. vLLM's engine has done so already, where there was one."""
    if count() > 1 and distributed.is_initialized():
        wait()
        distributed.destroy_process_group()
