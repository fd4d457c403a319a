"""SkyPilot as far as NeMo-Run builds a task with it: a task keeps what it is given. Nothing can be launched."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

LOOKING_FOR_IT = ("nemo_run.core.execution.skypilot", "nemo_run.run.torchx_backend.schedulers.skypilot")


class Task:
    """sky.task.Task, as far as its YAML."""

    def __init__(self, name, setup, run, envs, num_nodes):
        self.fields = {"name": name, "setup": setup, "run": run, "envs": dict(envs), "num_nodes": num_nodes}

    def set_file_mounts(self, mounts):
        self.fields["file_mounts"] = dict(mounts)

    def set_resources(self, resources):
        self.fields["resources"] = resources

    def update_envs(self, envs):
        self.fields["envs"] |= envs

    def to_yaml_config(self):
        return self.fields


def install(monkeypatch):
    """Put it where NeMo-Run looks for SkyPilot, for one test; the package itself is left alone where it is there."""
    if find_spec("sky") is not None:
        return
    for name in LOOKING_FOR_IT:  # imported before there is a `sky` that they would take for the real one
        monkeypatch.setattr(import_module(name), "_SKYPILOT_AVAILABLE", True)
    contents = {
        "sky": {},
        "sky.task": {"Task": Task},
        "sky.resources": {"Resources": SimpleNamespace(from_yaml_config=dict)},
        "sky.utils": {"common_utils": SimpleNamespace(dump_yaml_str=str)},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
