"""What the tests of several executors share."""

import base64
import contextlib
import json
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path


def git(folder, *arguments):
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def assert_no_secret(folder, secret, allowed):
    """Look into every file, and into what NeMo-Run stores compressed."""
    for file in folder.rglob("*"):
        if not file.is_file() or file.name.startswith(allowed):
            continue
        content = file.read_bytes()
        for packed in re.findall(rb"[A-Za-z0-9_=-]{60,}", content):
            try:
                content += zlib.decompress(base64.urlsafe_b64decode(packed))
            except (ValueError, zlib.error):
                continue
        assert secret not in content, file


def wait_until(true, timeout=600, every=0.1):
    """Wait for what is sure to come, on however busy a machine; asks `every` so many seconds."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(every)


def recipe_arguments(material, directory, processes):
    """The tiny recipe's, for thirty quick steps."""
    return {
        "base": str(material / "base"),
        "tokenizer": str(material / "hf"),
        "data": {"train": {str(material / "en"): 1.0}, "validation": {"en": str(material / "held_out")}},
        "processes": processes,
        "directory": str(directory),
        "max_steps": 30,
        "val_check_interval": 15,
        "global_batch_size": 4,
        "micro_batch_size": 2,
    }


def losses(directory):
    """Training losses by step, the last start's last."""
    lines = [json.loads(line) for line in next(Path(directory).rglob("steps.jsonl")).read_text().splitlines()]
    return [(line["step"], line["reduced_train_loss"]) for line in lines if "reduced_train_loss" in line]


@contextlib.contextmanager
def held_by_another_process(run_folder):
    """Have a process hold a run's folder meanwhile; gives its id."""
    code = (
        f"import pathlib, sys; from nemo_cpt.training.run_lock import hold; hold(pathlib.Path({str(run_folder)!r}))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout.readline() == "held\n"
        yield it.pid
        it.stdin.close()
