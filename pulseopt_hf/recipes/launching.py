"""`pulseopt-hf train --accelerate_config`: the command starts itself in several processes."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import catalogue

_MARK = "PULSEOPT_HF_LAUNCHED"  # set in the processes that a command has started
_GRACE = 600  # seconds for the processes to end after a signal
_OPTIONS = {  # of `accelerate launch`, each with its help
    "num_processes": "number of processes on all machines; the default profile is `ddp`",
    "num_machines": "number of machines; run the same command on each",
    "machine_rank": "rank of this machine, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "free port of machine 0",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that launch."""
    parser.add_argument(
        "--accelerate_config",
        metavar="PROFILE",
        help="launch with a profile: a name from `list`, e.g. `fsdp2`, or an Accelerate YAML file",
    )
    for name, about in _OPTIONS.items():
        parser.add_argument(f"--{name}", metavar="X", help=about)


def is_launched() -> bool:
    """Whether this process is one of those that `launch` has started."""
    return _MARK in os.environ


def launch(options: argparse.Namespace, words: Sequence[str]) -> int | None:
    """Start the command `words` in several processes, and wait for them.

    Ctrl-C and SIGTERM reach each of them, which saves a checkpoint before it ends. Returns the exit
    code of the process that failed first, or 0; `None` where there is nothing to launch.
    """
    given = {name: getattr(options, name) for name in _OPTIONS}
    arguments = [w for name, x in given.items() if x is not None for w in (f"--{name}", x)]
    if is_launched() or not (options.accelerate_config or arguments):
        return None
    if "RANK" in os.environ:
        raise UsageError(
            "`--accelerate_config` and `--num_processes` launch by themselves; leave them out, or "
            "leave out `accelerate launch` or `torchrun`."
        )
    profile = options.accelerate_config or "ddp"
    if not Path(profile).suffix:  # not a file of the user's
        profile = catalogue.LAUNCH + profile.removeprefix(catalogue.LAUNCH)
    file = catalogue.find(profile)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    module = ("--config_file", str(file), *arguments, "-m", "pulseopt_hf", *words)
    asked = launch_command_parser().parse_args(module)
    # torchrun passes a signal on and waits; its 30 seconds are short for a large checkpoint. Where
    # torch is too old for this, Accelerate leaves it out.
    asked.shutdown_timeout = _GRACE
    # A single process is reached by Ctrl-C without torchrun, and has to be waited for.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with patch_environment(**{_MARK: "1"}):
            launch_command(asked)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)  # negative if a signal ended it
    except subprocess.CalledProcessError as error:
        return max(1, error.returncode)
    except SignalException:
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def leave_ranks(error: type[BaseException] | None, *_: object) -> None:
    """Leave the process group at the end; a rank that keeps it can abort when Python exits.

    A rank that failed keeps it, as others may wait for it, and NCCL would wait for them. A
    `UsageError` is raised on all ranks.
    """
    from torch import distributed

    if (error is None or issubclass(error, UsageError)) and distributed.is_initialized():
        distributed.destroy_process_group()
