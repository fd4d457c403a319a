"""The whole road of Llama-3.1-8B at its real size, through the command line, on all GPUs of this machine.

usage: python benchmarks/walk_8b.py --tokenizer FOLDER [--work FOLDER] [--layers 32] [KEY=VALUE ...]

Random weights and the demo's text: losses mean nothing but "equal". base -> import -> prepare -> plan -> doctor ->
train -> SIGKILL of every process behind the first checkpoint -> resume -> export -> verify. Each step's seconds and the
host's and the fullest GPU's peak are printed as they come, and at the end; the plan says what they should be. KEY=VALUE
are parameters of `llama31_8b.continual_pretrain`, such as tensor_model_parallel_size=1 or precision=fp8.

FOLDER of the tokenizer: Llama-3.1's, or another's whose ids fit 128,256 rows. The disk takes 32 GB for the base in two
formats and 112 GB a checkpoint (8.03 B parameters x 14 bytes); without room for a second one the resumed run is killed
as well when it has done the first one's steps again.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from llama31_8b import CONFIG, ROPE_SCALING

from nemo_cpt.doctor import nvidia
from nemo_cpt.training.metrics import read_metrics
from nemo_cpt.training.run_folder import newest_whole

GIB = 2**30
STEPS, SAVE_EVERY, STEPS_BEHIND_THE_SAVE = 6, 3, 2
RECIPE = "llama31_8b.continual_pretrain"


class Walk:
    """The commands of the road in one folder, with their times and peaks.

    Args:
        work: where everything goes.
        arguments: the recipe's.
    """

    def __init__(self, work: Path, arguments: list[str]) -> None:
        self.work, self.arguments, self.rows = work, arguments, list[str]()
        checkout = Path(__file__).parents[1]
        self.environment = os.environ | {
            "PYTHONPATH": f"{checkout}:{os.environ.get('PYTHONPATH', '')}",
            "NEMORUN_HOME": str(work / "nemo_run"),
        }

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        """Start `nemo-cpt COMMAND` in a session of its own, its output in command.log."""
        with (self.work / "command.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "nemo_cpt.cli", *map(str, command)], cwd=self.work, env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self, *command: object, checked: bool = True) -> str:
        """Run `nemo-cpt COMMAND` and return what it printed; its row has the time and the peaks."""
        with self.row(str(command[0])):
            code = self.start(*command).wait()
        text = (self.work / "command.log").read_text(errors="replace")
        if code and checked:
            raise SystemExit(f"nemo-cpt {' '.join(map(str, command))}: exit code {code}\n{text[-6000:]}")
        return text

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Time what happens within, and watch host and GPUs."""
        peaks, done = Peaks(), threading.Event()
        watcher = threading.Thread(target=peaks.watch, args=(done,))
        watcher.start()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        self.rows.append(f"| {name} | {seconds:.0f} s | {peaks.host_gib:.1f} GiB | {peaks.gpu_gib:.1f} GiB |")
        print(self.rows[-1], flush=True)


class Peaks:
    """The most memory in use: of the host beyond what was in use before, and of any GPU."""

    def __init__(self) -> None:
        self.before, self.host_gib, self.gpu_gib = _host_bytes(), 0.0, 0.0

    def watch(self, done: threading.Event) -> None:
        """Look four times a second until `done`."""
        while not done.wait(0.25):
            self.host_gib = max(self.host_gib, (_host_bytes() - self.before) / GIB)
            used = [gpu.used_mib or 0 for gpu in nvidia.read().gpus]
            self.gpu_gib = max(self.gpu_gib, max(used, default=0) / 1024)


def _host_bytes() -> int:
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def make_base(folder: Path, tokenizer: Path, layers: int) -> None:
    """A Llama-3.1-8B of random bf16 weights in Hugging Face's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **CONFIG | {"num_hidden_layers": layers},
        rope_scaling=ROPE_SCALING,
        bos_token_id=128_000,
        eos_token_id=128_001,
        torch_dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(file, folder)


def until(happened: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for something that a running command brings about."""
    while not happened():
        if process.poll() is not None:
            raise SystemExit(f"it ended with exit code {process.returncode}\n{log.read_text(errors='replace')[-6000:]}")
        time.sleep(0.2)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a command and all that it started, ranks with sessions of their own too; until the GPUs are free."""
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(processes)
    killed = {each.pid for each in processes}
    while killed & {each.pid for each in nvidia.read().processes}:
        time.sleep(0.2)


def losses(run: Path) -> dict[int, float]:
    """The training losses of a run by their steps."""
    return {int(line["step"]): line["reduced_train_loss"] for line in read_metrics(run) if "reduced_train_loss" in line}


def train(walk: Walk, gpus: int, doctor: bool) -> None:
    """Train, kill, resume; the steps behind the checkpoint must come out as before."""
    run, log = walk.work / "results/walk", walk.work / "command.log"
    data = "{train: {ds/ja: 1.0}, validation: {ja: ds/ja_validation}}"
    arguments = [
        RECIPE, "base=base", "name=walk", f"data={data}", "untrained_base=true", f"gpus_per_node={gpus}",
        f"max_steps={STEPS}", f"val_check_interval={SAVE_EVERY}", "log.ckpt.save_top_k=1", *walk.arguments,
    ]  # fmt: skip
    if doctor:
        print(walk.run("doctor", *arguments, checked=False)[-4000:], flush=True)
    # Whatever it found: its finding on the disk, above all, is this script's to deal with.
    command = ["run", *arguments, "--force"]
    with walk.row(f"train, checkpoint at step {SAVE_EVERY} whole"):
        process = walk.start(*command)
        until(lambda: newest_whole(run / "checkpoints") is not None, process, log)
    with walk.row("and some steps more"):
        until(lambda: max(losses(run), default=0) >= SAVE_EVERY + STEPS_BEHIND_THE_SAVE - 1, process, log)
    first = losses(run)
    kill(process)
    size = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    print(f"a checkpoint has {size / 1e9:.1f} GB; losses {first}", flush=True)
    room = shutil.disk_usage(walk.work).free > 1.05 * size
    with walk.row("resumed" + (", to the end" if room else " (killed again: no room for a second checkpoint)")):
        process = walk.start(*command)
        if room:
            if process.wait():
                raise SystemExit(f"exit code {process.returncode}\n{log.read_text(errors='replace')[-6000:]}")
        else:
            last = max(first)
            until(lambda: "resumed_from" in _metrics(run) and max(losses(run)) >= last, process, log)
            kill(process)
    again = losses(run)
    apart = max(abs(again[step] - loss) for step, loss in first.items())
    print(f"losses of the steps done twice differ by at most {apart:.2e}", flush=True)
    walk.rows.append(f"| losses of the steps done twice | differ by at most {apart:.2e} | | |")


def _metrics(run: Path) -> str:
    return (run / "metrics/steps.jsonl").read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("walk-8b"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--skip", action="append", default=[], choices=("plan", "doctor"), help="may be repeated")
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    gpus = torch.cuda.device_count()
    walk = Walk(options.work.resolve(), [f"global_batch_size={8 * gpus}", *options.arguments])
    if options.layers != 32:
        walk.arguments.append("model=base")
    print(f"{gpus} x {torch.cuda.get_device_name()}, {psutil.virtual_memory().total / GIB:.0f} GiB of host memory")
    with walk.row("base"):
        making = (options.work.resolve() / "hf", options.tokenizer.resolve(), options.layers)
        # In a process of its own: this one must hold no GPU.
        script = "import sys; from pathlib import Path; from walk_8b import make_base; " \
            "make_base(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"  # fmt: skip
        subprocess.run([sys.executable, "-c", script, *map(str, making)], check=True, cwd=Path(__file__).parent)
    walk.run("import", "hf", "base")
    for file in (walk.work / "hf").glob("*.safetensors"):  # its room is the checkpoint's
        file.unlink()
    corpus = Path(__file__).parents[1] / "nemo_cpt/demo/corpus/ja.jsonl"
    walk.run("split", corpus, "--output", "text", "--validation", "0.1")
    walk.run("prepare", "text/train.jsonl", "--output", "ds/ja", "--tokenizer", "base/hf")
    walk.run("prepare", "text/validation.jsonl", "--output", "ds/ja_validation", "--tokenizer", "base/hf")
    if "plan" not in options.skip:
        print(walk.run("plan", RECIPE, "base=base", f"gpus_per_node={gpus}", *walk.arguments), flush=True)
    train(walk, gpus, "doctor" not in options.skip)
    checkpoint = newest_whole(walk.work / "results/walk/checkpoints")
    assert checkpoint is not None
    walk.run("export", checkpoint.path, "out")
    print(walk.run("verify", checkpoint.path, "out")[-800:])
    print("\n| step | time | host | fullest GPU |\n|---|---|---|---|\n" + "\n".join(walk.rows))


if __name__ == "__main__":
    main()
