"""Everything in the daemon and its clients that reads what others wrote."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from spiked.bench.fuzz import Decoder
from spiked.bench.fuzz_clients import (
    control_request,
    endpoints,
    operation,
    published_message,
    replay_answer,
    replay_request,
    reply,
)
from spiked.bench.fuzz_devices import (
    maxwell,
    mqtt_command,
    open_ephys,
    spikeglx,
    text_replies,
    trigger_socket,
)
from spiked.bench.fuzz_files import (
    access_list,
    configuration,
    electrode_map,
    key_file,
    ledger,
    probe_file,
    redo_log,
    sequences,
    session_file,
    spool,
    state_file,
    stream_description,
    superblock,
    task,
    templates,
)

MAKERS: OrderedDict[str, Callable[[Path], Decoder]] = OrderedDict(
    (make.__name__.replace("_", " "), make)
    for make in (
        published_message, replay_answer, reply, endpoints, control_request, replay_request, operation, open_ephys, maxwell, spikeglx, trigger_socket,
        text_replies, mqtt_command, configuration, access_list, key_file, task, stream_description, superblock, electrode_map, probe_file, ledger,
        spool, state_file, redo_log, sequences, templates, session_file,
    )
)  # fmt: skip
NAMES = tuple(MAKERS)


def all_decoders(folder: Path) -> Iterator[Decoder]:
    """Each in a folder of its own under `folder`."""
    for name, make in MAKERS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        decoder = make(place)
        assert decoder.name == name
        yield decoder
