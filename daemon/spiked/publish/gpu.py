"""What nvidia-smi says of the GPUs; nothing where there is none. Never imports torch, never touches a device."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import Any

FIELDS = ("index", "name", "memory.used", "memory.total", "temperature.gpu", "utilization.gpu")
PATIENCE_S = 5.0


def parse(text: str) -> list[dict[str, Any]]:
    """GPUs from nvidia-smi's CSV without header and units; what it does not know ("[N/A]") is left out."""
    gpus = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(",")]
        if len(cells) != len(FIELDS) or not cells[0].isdigit():
            continue
        gpu: dict[str, Any] = {"index": int(cells[0]), "name": cells[1]}
        for key, cell in zip(
            ("memory_used_mb", "memory_mb", "celsius", "busy_ratio"), cells[2:], strict=True
        ):
            with contextlib.suppress(ValueError):
                gpu[key] = float(cell) / 100 if key == "busy_ratio" else float(cell)
        gpus.append(gpu)
    return gpus


async def read_gpus() -> list[dict[str, Any]]:
    """index, name, memory_used_mb, memory_mb, celsius, busy_ratio of each; [] where nvidia-smi is missing or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = f"--query-gpu={','.join(FIELDS)}"
    try:
        process = await asyncio.create_subprocess_exec(
            command, query, "--format=csv,noheader,nounits", stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return []
    try:
        async with asyncio.timeout(PATIENCE_S):
            out, _ = await process.communicate()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return []
    return parse(out.decode("utf-8", "replace"))
