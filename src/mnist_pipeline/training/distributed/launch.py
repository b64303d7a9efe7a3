"""How the processes of one training start, meet, check that they agree, and end.

torch.distributed starts them, on one machine or on several, and starts them again when one dies.
Source: PyTorch's documentation of torchrun.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from mnist_pipeline.common.errors import UserError, set_up_process
from mnist_pipeline.common.files import read_text
from mnist_pipeline.common.params import Params
from mnist_pipeline.common.paths import ADDED, RAW
from mnist_pipeline.data.training_set import load_training_data
from mnist_pipeline.model.inference import set_up_torch
from mnist_pipeline.model.network import build_model
from mnist_pipeline.training.distributed.group import Group, train_in_group
from mnist_pipeline.training.loop import start_training

_RESTARTS = 3  # when a process dies, all start again, at most so often
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
# torchrun's variables for its options --nnodes, --rdzv-endpoint and --local-addr.
_NODES, _ENDPOINT, _ADDRESS = "PET_NNODES", "PET_RDZV_ENDPOINT", "PET_LOCAL_ADDR"
_CAN_LEAD = "MNIST_CAN_LEAD"  # set for the processes that `launch` starts, not for those of other machines
# Gives each restart a new store to meet in: a shared one lists the addresses of dead processes.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_MISTAKE = "mistake"  # the key of an error that a process tells the others

# The train stage. It takes the params and, if there are several processes, the training loop for them.
Stage = Callable[..., None]
# Returns what must be equal in all processes, by name.
Identify = Callable[[Params], Mapping[str, object]]


def launch(stage: Stage, params: Params, identify: Identify) -> None:
    """Run the train stage in `train.processes` processes, or in this process if that is 1.

    When a process dies, all start again, up to three times, and go on from the checkpoint. To use several machines,
    call this on the one that leads, and run torchrun on the others. Set two of torchrun's variables on the leading
    machine: PET_NNODES (the number of machines) and PET_RDZV_ENDPOINT (its host:port, where they meet).

    Raises:
        UserError: the stage raised it, or the processes failed for good.
    """
    if dist.is_torchelastic_launched():
        _take_part(stage, params, identify)
        return
    processes = params.train.processes
    nodes = _count_machines(processes)
    if (wanted := processes // nodes * params.threads) > (cores := os.cpu_count() or 1):
        print(
            f"warning: train.processes and threads make {wanted} threads on the {cores} cores of this machine: "
            "they will wait for one another",
            file=sys.stderr,
            flush=True,
        )
    if processes == 1:
        stage(params)
        return
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException  # slow to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    endpoint = _meeting_point(nodes)
    for noisy in ("torch.multiprocessing.spawn", "torch.distributed.elastic"):  # `join_group` reports a death
        logging.getLogger(noisy).addHandler(logging.NullHandler())
        logging.getLogger(noisy).propagate = False  # torch sets the levels of the loggers below one by one
    os.environ |= {_CAN_LEAD: "1", _OWN_STORE: "1"}
    with tempfile.TemporaryDirectory() as temporary:
        mistake = Path(temporary) / "mistake"
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes // nodes,
            run_id="none",  # torchrun's default
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"is_host": True},
            local_addr=os.environ.get(_ADDRESS) or (None if nodes > 1 else "localhost"),
            max_restarts=_RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=temporary),
        )
        if nodes > 1:
            print(f"Waiting at {endpoint} for machines: {nodes - 1} more, ten minutes at most", flush=True)
        try:
            elastic_launch(config, _run_worker)(stage, params, identify, mistake)
        except SignalException:
            if not mistake.exists():  # else the process with the mistake sent the signal
                raise KeyboardInterrupt from None
        except RendezvousError as error:
            if not mistake.exists():  # else the mistake is the reason
                why = f"{type(error).__name__}: {error}".strip(": ")
                raise UserError(f"the machines did not meet at {endpoint}, or one has left ({why})") from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                raise
            raise UserError(
                f"processes were killed {_RESTARTS + 1} times, at last process {rank} by {failure.signal_name()}: "
                f"is there enough memory for train.processes ({processes})?"
            ) from None
        if mistake.exists():
            raise UserError(read_text(mistake))


def _count_machines(processes: int) -> int:
    """Return the number of machines (PET_NNODES); each must get the same number of processes."""
    given = os.environ.get(_NODES, "1")
    if not given.isdecimal() or not (nodes := int(given)) or processes % nodes:
        raise UserError(f"train.processes must be a multiple of {_NODES}, and is {processes} ({_NODES} is {given})")
    return nodes


def _meeting_point(nodes: int) -> str:
    """Return the host:port where the machines meet: PET_RDZV_ENDPOINT, or any free port here for a single machine."""
    if nodes == 1:
        return "localhost:0"
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    endpoint = os.environ.get(_ENDPOINT, "")
    try:
        host, port = parse_rendezvous_endpoint(endpoint, default_port=0)
        if not port:
            raise ValueError("the port is missing")
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{_ENDPOINT} must be a host:port of this machine, where the others meet it, and is {endpoint!r} ({error})"
        ) from None
    return endpoint


def _run_worker(stage: Stage, params: Params, identify: Identify, mistake: Path) -> None:
    """Run one of the processes. Write a user's mistake to a file, so that a restart does not repeat it."""
    if mistake.exists():
        return
    set_up_process()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the other processes
    try:
        _take_part(stage, params, identify)
    except (UserError, OSError) as error:
        with suppress(FileExistsError), mistake.open("x", encoding="utf-8") as file:  # the first mistake is said
            file.write(str(error))
            file.flush()
            os.kill(os.getppid(), signal.SIGTERM)  # this machine's launcher, for the others would wait for ever


def _take_part(stage: Stage, params: Params, identify: Identify) -> None:
    with join_group(params.threads) as group:
        check_agreement(group, params, identify)
        if group.leads:
            stage(params, partial(train_in_group, group))
        else:
            _follow(group, params)


def _follow(group: Group, params: Params) -> None:
    """Train as the stage does, and write nothing."""
    parts = load_training_data(RAW, ADDED, params.data, params.seed)
    digits, monitor = (part.tensors(params.data, group.device) for part in parts.values())
    network = build_model(params.model, params.seed, len(params.data.classes)).to(group.device)
    training = start_training(network, params.train)
    for _ in train_in_group(group, training, digits, monitor, params.train, params.seed):
        pass


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Interrupt this process, and ignore further signals: the launcher sends a second one during the clean-up."""
    for interruption in _INTERRUPTIONS:
        signal.signal(interruption, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def join_group(threads: int) -> Iterator[Group]:
    """Set up torch and join the group that torchrun started this process for. Only the leader prints."""
    device = set_up_torch(threads)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        group = Group(dist.get_rank(), dist.get_world_size(), device, can_lead=_CAN_LEAD in os.environ)
        if group.leads:
            for interruption in _INTERRUPTIONS:
                signal.signal(interruption, _interrupt_once)
        if group.leads and (restart := int(os.environ["TORCHELASTIC_RESTART_COUNT"])):
            print(f"A process died: all start again, {restart} of at most {_RESTARTS} times", flush=True)
        with open(os.devnull, "w") as nowhere, ExitStack() as silence:
            if not group.leads:
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))  # where progress is drawn
            yield group
    finally:
        for interruption in _INTERRUPTIONS:
            signal.signal(interruption, signal.SIG_DFL)  # nothing is left to clean up
        dist.destroy_process_group()


def check_agreement(group: Group, params: Params, identify: Identify) -> None:
    """Check that all processes run the same training.

    Raises:
        UserError: the processes differ in commit, lock file, code, params or data, or one lacks them; or torchrun did
            not start `train.processes` processes. Every process raises it.
    """
    own: Mapping[str, object]
    try:
        own = identify(params)
    except (UserError, OSError) as error:
        own = {_MISTAKE: str(error)}
    found = group.exchange(own)
    for rank, others in enumerate(found):
        if _MISTAKE in others:
            raise UserError(f"{others[_MISTAKE]} (process {rank})")
    leaders = found[group.leader]
    for rank, others in enumerate(found):
        for name in leaders | others:
            theirs, leading = others.get(name, "absent"), leaders.get(name, "absent")
            if theirs != leading:
                raise UserError(f"{name} is {theirs} in process {rank}, {leading} in the leading one: make them equal")
    if (wanted := params.train.processes) != group.size:
        raise UserError(f"train.processes is {wanted}, and torchrun started {group.size}: make them equal")
