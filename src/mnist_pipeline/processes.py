"""How one training comes to run in several processes: they are started, meet, compare what they have, and end.

torch.distributed starts them, on one machine or on several, and starts them again when one dies.
Source: PyTorch's documentation of torchrun.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from mnist_pipeline.errors import UserError
from mnist_pipeline.files import read_text, sha256, write_text
from mnist_pipeline.inference import set_up_torch
from mnist_pipeline.parallel import Group
from mnist_pipeline.params import Params
from mnist_pipeline.paths import REQUIREMENTS
from mnist_pipeline.provenance import Provenance, commit

RESTARTS = 3  # of all processes, each time that one has died
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
# Of torchrun, its options --nnodes, --rdzv-endpoint and --local-addr.
NODES, ENDPOINT, ADDRESS = "PET_NNODES", "PET_RDZV_ENDPOINT", "PET_LOCAL_ADDR"
DRIVES = "MNIST_DRIVES"  # in the environment of those processes that this machine's pipeline has started
# Each start of the processes gets a store of its own to meet in: a shared one has the addresses of dead processes.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
MISTAKE = "mistake"  # of a process that lacks what the others have


def launch(work: Callable[[Params], None], params: Params) -> None:
    """Do work in as many processes as the params say; in this one, if one is enough or torchrun started it.

    When a process dies, all are started again, some times; the work is to go on from what it has kept. The variables
    of torchrun spread the processes over machines: `NODES` says on how many, `ENDPOINT` (host:port) where they meet:
    on the machine that calls this, which leads. The others run torchrun.

    Raises:
        UserError: the work raised it, or has failed for good.
    """
    if dist.is_torchelastic_launched():
        work(params)
        return
    processes = params.train.processes
    nodes = machines(processes)
    if processes == 1:
        work(params)
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException  # slow to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint = meeting_point(nodes)
    if (wanted := processes // nodes * params.threads) > (cores := os.cpu_count() or 1):
        print(
            f"warning: train.processes and threads make {wanted} threads on the {cores} cores of this machine: "
            "they will wait for one another",
            file=sys.stderr,
            flush=True,
        )
    for noisy in ("torch.multiprocessing.spawn", "torch.distributed.elastic"):  # of a process that died, `join` tells
        logging.getLogger(noisy).addHandler(logging.NullHandler())
        logging.getLogger(noisy).propagate = False  # the levels of the loggers below are set one by one
    os.environ |= {DRIVES: "1", OWN_STORE: "1"}
    with tempfile.TemporaryDirectory() as temporary:
        mistake = Path(temporary) / "mistake"
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes // nodes,
            run_id="none",  # torchrun's, unless it is given another
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"is_host": True},
            local_addr=os.environ.get(ADDRESS) or (None if nodes > 1 else "localhost"),
            max_restarts=RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=temporary),
        )
        if nodes > 1:
            print(f"Waiting at {endpoint} for machines: {nodes - 1} more, ten minutes at most", flush=True)
        try:
            elastic_launch(config, attempt)(work, params, mistake)
        except SignalException:
            if not mistake.exists():  # else the process that made it has sent the signal
                raise KeyboardInterrupt from None
        except RendezvousError as error:
            if not mistake.exists():  # else that is why
                why = f"{type(error).__name__}: {error}".strip(": ")
                raise UserError(f"the machines did not meet at {endpoint}, or one has left ({why})") from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                raise
            raise UserError(
                f"processes were killed {RESTARTS + 1} times, at last process {rank} by {failure.signal_name()}: "
                f"is there memory for {processes} (train.processes)?"
            ) from None
        if mistake.exists():
            raise UserError(read_text(mistake))


def machines(processes: int) -> int:
    """Return over how many machines the processes are spread.

    Raises:
        UserError: `NODES` gives them no equal shares.
    """
    given = os.environ.get(NODES, "1")
    if not given.isdecimal() or not (nodes := int(given)) or processes % nodes:
        raise UserError(f"train.processes must be a multiple of {NODES}, and is {processes}, where {NODES} is {given}")
    return nodes


def meeting_point(nodes: int) -> str:
    """Return where machines meet, as host:port: on this one, at any free port if there is no other.

    Raises:
        UserError: there are others, and nothing can listen at `ENDPOINT`.
    """
    if nodes == 1:
        return "localhost:0"
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    endpoint = os.environ.get(ENDPOINT, "")
    try:
        host, port = parse_rendezvous_endpoint(endpoint, default_port=0)
        if not port:
            raise ValueError("the port is missing")
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{ENDPOINT} must be a host:port of this machine, where the others meet it, and is {endpoint!r} ({error})"
        ) from None
    return endpoint


def attempt(work: Callable[[Params], None], params: Params, mistake: Path) -> None:
    """Do work in a process of its own, and put a user's mistake into a file: who starts again must not repeat it."""
    if mistake.exists():
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the other processes
    try:
        work(params)
    except (UserError, OSError) as error:
        write_text(mistake, str(error))
        if os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["LOCAL_RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)  # this machine's launcher, which would wait minutes for the others


def interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Interrupt this process, not its clean-up: the signal comes from the terminal and once more from the launcher."""
    for interruption in INTERRUPTIONS:
        signal.signal(interruption, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def join(threads: int) -> Iterator[Group]:
    """Set torch up and give the group that this process belongs to, of one where `launch` started no others.

    Only its leader prints.
    """
    device = set_up_torch(threads)
    if not dist.is_torchelastic_launched():
        yield Group(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        group = Group(dist.get_rank(), dist.get_world_size(), device, drives=DRIVES in os.environ)
        if group.leads:
            for interruption in INTERRUPTIONS:
                signal.signal(interruption, interrupt_once)
        if group.leads and (restart := int(os.environ["TORCHELASTIC_RESTART_COUNT"])):
            print(f"A process died: all start again, {restart} of at most {RESTARTS} times", flush=True)
        with open(os.devnull, "w") as nowhere, ExitStack() as silence:
            if not group.leads:
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))  # where progress is drawn
            yield group
    finally:
        for interruption in INTERRUPTIONS:
            signal.signal(interruption, signal.SIG_DFL)  # there is nothing left to end in good order
        dist.destroy_process_group()


def agree(group: Group, trace: Callable[[], Provenance]) -> Provenance:
    """Return what this process is to make its outputs from, which must be the same in all.

    Raises:
        UserError: one process has another commit, other versions of packages, code, params or data, or lacks some;
            or torchrun started another number of processes than the params say. All processes raise it.
    """
    own: dict[str, object] = {}
    try:
        provenance = trace()
        if group.size > 1:
            own = identity(provenance)
    except (UserError, OSError) as error:
        own = {MISTAKE: str(error)}
    found = group.exchange(own)
    for rank, others in enumerate(found):
        if MISTAKE in others:
            where = f" (process {rank})" if group.size > 1 else ""
            raise UserError(f"{others[MISTAKE]}{where}")
    leaders = found[group.leader]
    for rank, others in enumerate(found):
        for name in leaders | others:
            theirs, leading = others.get(name, "absent"), leaders.get(name, "absent")
            if theirs != leading:
                raise UserError(f"{name} is {theirs} in process {rank}, {leading} in the leading one: make them equal")
    if (processes := provenance.params["train.processes"]) != group.size:
        raise UserError(f"train.processes is {processes}, and torchrun started {group.size}: make them equal")
    return provenance


def identity(provenance: Provenance) -> dict[str, object]:
    """Name all that must be the same in processes that train together; of files, their SHA-256."""
    return {
        "git_commit": commit()["git_commit"],
        str(REQUIREMENTS): sha256(REQUIREMENTS),
        "command": provenance.command,
        **provenance.params,
        **provenance.inputs,
    }
