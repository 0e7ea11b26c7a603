"""Real-time priority for the processes that samples pass through, where the system lets us have it.

The recording comes first: acquire before record before live, all before everything else on the machine. The
service's unit grants it (LimitRTPRIO); elsewhere the nearest thing that is allowed is taken, and said.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

REALTIME = {  # SCHED_RR priorities; a socket's thread goes before the thread it serves
    "device": 40, "acquire_network": 31, "acquire": 30, "record": 20, "client": 15, "live_network": 11, "live": 10,
}  # fmt: skip
NICE = -10
PR_SET_TIMERSLACK, SLACK_NS = 29, 1000
PR_SET_PDEATHSIG = 1
SWITCH_S = 0.0002  # how long another thread may keep the interpreter from the sample path


def raise_priority(role: str, wanted: str = "auto") -> str:
    """Take the priority of this role for this thread and those it starts; what was obtained, in words.

    `wanted` "normal" leaves things as they are. On a machine with one core nothing may starve the rest, so only
    niceness is asked for.
    """
    sys.setswitchinterval(SWITCH_S)
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK_NS, 0, 0, 0)  # wake when asked, not up to 50 us later
    if wanted == "normal":
        return "normal"
    if (os.cpu_count() or 1) > 1:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME[role]))
            return f"real-time {REALTIME[role]}"
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        return f"nice {NICE}"
    return "normal"


def lower_priority(nice: int) -> None:
    """For a child of such a process, before it starts its program: an ordinary, nicer process."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def end_with(parent: int) -> None:
    """SIGTERM for this process when the one that started it, whose number is `parent`, dies; also if it just has."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
