"""The machine that a benchmark ran on."""

import os
import platform
import re
import time
from pathlib import Path

import psutil


def describe_machine() -> list[str]:
    """Lines for the head of a page: date, processor, memory, system, and how busy the machine was before."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    model = models[0] if models else platform.processor()
    return [
        f"- Date: {time.strftime('%Y-%m-%d')}",
        f"- Machine: {model}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, "
        f"{platform.system()} {platform.release()}; load average at the end {os.getloadavg()[0]:.1f}",
    ]
