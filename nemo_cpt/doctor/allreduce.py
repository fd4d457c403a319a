"""One rank of an all-reduce, as `python -m nemo_cpt.doctor.allreduce`; RANK, WORLD_SIZE and MASTER_* say which.

NCCL where every rank has a GPU, else gloo. Rank 0 prints one line of JSON.
"""

import json
import os
import time
from datetime import timedelta
from typing import Any

MARK = "DOCTOR"
BYTES = 64 * 2**20


def main() -> None:
    """Join the others, add up the ranks, and time a sum of 64 MiB."""
    import torch
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    start = time.monotonic()
    backend = "nccl" if on_gpu else "gloo"
    # The default of 10 minutes would outlast the doctor.
    dist.init_process_group(backend, timeout=timedelta(seconds=float(os.environ["DOCTOR_SECONDS"])))
    total = torch.ones(1, device=device) * rank
    dist.all_reduce(total)
    world = dist.get_world_size()
    if int(total.item()) != world * (world - 1) // 2:
        raise SystemExit(f"the ranks add up to {total.item()}, not {world * (world - 1) // 2}")
    joined = time.monotonic() - start
    seconds = _seconds_of_a_sum(torch.ones(BYTES // 4, device=device), torch, dist)
    if rank == 0:
        moved = 2 * (world - 1) / world * BYTES  # a ring sends each byte so often: nccl-tests' "bus bandwidth"
        print(MARK + json.dumps({"backend": backend, "joined": joined, "gb_per_second": moved / seconds / 1e9}))
    dist.destroy_process_group()


def _seconds_of_a_sum(values: Any, torch: Any, dist: Any) -> float:
    """The fastest of three: the first also sets up the channels."""
    measured = []
    for _ in range(3):
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        measured.append(time.monotonic() - start)
    return min(measured)


if __name__ == "__main__":
    main()
