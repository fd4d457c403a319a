"""The inputs of a corpus shared out among several tasks, on one machine or on many that share a file system.

`plan.json`, in a folder of the output whose name ends in `.parts`, says what each task reads, and how. Beside it each
task leaves its part, whose files' names begin with `part-NUMBER`, until the parts are joined.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from nemo_cpt.corpus.atomic_files import make_folder, write_whole
from nemo_cpt.corpus.reading.sources import PLAN, Source, listed_again
from nemo_cpt.errors import CptError

EXPERIMENT = "experiment"  # the id of that which makes the parts, where one does


@dataclass(frozen=True)
class Plan:
    """What the tasks do.

    Attributes:
        folder: Where plan and parts are, absolute.
        job: What makes two plans the same job, beside the inputs and how they are shared out.
        settings: Whatever else the tasks must be told.
        sources: The inputs in order.
        shares: What each task reads of them.
        overwrite: Replace what is there.
    """

    folder: Path
    job: dict[str, Any]
    settings: dict[str, Any]
    sources: list[Source]
    shares: list[list[Source]]
    overwrite: bool = False

    @cached_property
    def key(self) -> str:
        """A digest of what makes two plans the same job."""
        return hashlib.sha256(orjson.dumps(self._described(), option=orjson.OPT_NON_STR_KEYS)).hexdigest()[:16]

    def _described(self) -> dict[str, Any]:
        # Without times: a file that was touched is the same input, and its content is compared by its hash.
        return self.job | {
            "inputs": [[source.path, source.kind, source.size] for source in self.sources],
            "tasks": len(self.shares),
            "ranges": [[[source.path, source.start, source.stop] for source in share] for share in self.shares],
        }

    def part(self, number: int) -> str:
        """Return how the path of each file of a part begins."""
        return str(self.folder / f"part-{number:05}")

    def shares_now(self) -> list[list[Source]]:
        """Return the shares, of the inputs as they are on the disk now.

        Raises:
            CptError: An input is not there any more.
        """
        now = {source.path: listed_again(source) for source in self.sources}
        return [[replace(now[each.path], start=each.start, stop=each.stop) for each in share] for share in self.shares]

    def share(self, number: int) -> list[Source]:
        """Return what a task reads, which must be as it was when the tasks were planned.

        Raises:
            CptError: There is no such task, or an input changed.
        """
        if not 0 <= number < len(self.shares):
            raise CptError(f"{self.folder} has the tasks 0 to {len(self.shares) - 1}, not {number}.")
        for source in self.shares[number]:
            now = listed_again(source)
            if (now.size, now.mtime_ns) != (source.size, source.mtime_ns):
                raise CptError(
                    f"{source.path} changed since the tasks were planned: it had {source.size:,} bytes, now it has "
                    f"{now.size:,}. Run the same command again once nothing writes to it."
                )
        return self.shares[number]

    def take_up(self, missing: Callable[[], list[int]]) -> list[int]:
        """Go on with this plan where it is there, else begin it; return the numbers of the parts that are to be made.

        Args:
            missing: Returns the numbers of those that are not there, or not done.

        Raises:
            CptError: Parts of another job are there.
        """
        if (self.folder / PLAN).exists():
            self._check_same_job()
        # Before the plan is written: it may refuse, and then nothing is left behind.
        numbers = missing()
        self.write()
        return numbers

    def _check_same_job(self) -> None:
        try:
            there = Plan.read(self.folder)
        except CptError:
            if not self.overwrite:
                raise
            return remove_parts(self.folder)
        if there.key == self.key:
            return
        if not self.overwrite:
            raise CptError(self._how_it_differs(there))
        remove_parts(self.folder)

    def _how_it_differs(self, there: "Plan") -> str:
        ours, theirs = self._described(), there._described()
        differing = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        shown = [key for key in differing if key not in ("inputs", "ranges")]
        # Lists of inputs and ranges would fill a screen: what became of them is said in words.
        words = [f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}" for key in shown]
        changed = self._changed_since(there)
        if "inputs" in differing or not shown:
            words.append(changed or "their inputs are others")
        # Of inputs that changed that job's command is this one, and would come back here.
        finish = "Its shares were cut from what was there before" if changed else "Run its command again to finish it"
        return (
            f"{self.folder} holds parts of another job: {'; '.join(words)}. {finish}; take another output, or discard "
            "the parts with overwrite=True (--overwrite)."
        )

    def _changed_since(self, there: "Plan") -> str:
        """What became of the inputs of another plan of the same files; "" where it has others."""
        if [source.path for source in self.sources] != [source.path for source in there.sources]:
            return ""
        found = ", ".join(
            f"{now.path} changed since the tasks were planned (it had {was.size:,} bytes, now it has {now.size:,})"
            for now, was in zip(self.sources, there.sources, strict=True)
            if now.size != was.size
        )
        ours, theirs = self._described(), there._described()
        # Shares end where lines do: as many of the same sizes are cut elsewhere only where the lines are others.
        if not found and ours["tasks"] == theirs["tasks"] and ours["ranges"] != theirs["ranges"]:
            return "the content of their inputs changed since the tasks were planned"
        return found

    def write(self) -> None:
        """Write it where the tasks find it."""
        make_folder(self.folder)
        numbers = {source.path: number for number, source in enumerate(self.sources)}
        content = {
            "job": self.job,
            "settings": self.settings,
            "sources": [asdict(source) for source in self.sources],
            # By the inputs' numbers: thousands of tasks would each repeat the paths.
            "shares": [[[numbers[each.path], each.start, each.stop] for each in share] for share in self.shares],
            "overwrite": self.overwrite,
        }
        write_whole(self.folder / PLAN, orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Plan":
        """Read the plan of a folder.

        Raises:
            CptError: It is not there, as where the file system is not the one that it was written to; or damaged.
        """
        folder = Path(os.path.abspath(folder))
        path = folder / PLAN
        try:
            content = orjson.loads(path.read_bytes())
            sources = [Source(**entry) for entry in content.pop("sources")]
            shares = [
                [replace(sources[number], start=start, stop=stop) for number, start, stop in share]
                for share in content.pop("shares")
            ]
            return cls(folder, sources=sources, shares=shares, **content)
        except OSError as error:
            raise CptError(
                f"{path} cannot be read on {socket.gethostname()}: {error.strerror}. The command with --tasks makes "
                "it; the output must be on a file system that every task's machine sees under the same path."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise CptError(f"{path} is damaged: {error}. Begin anew with overwrite=True (--overwrite).") from error

    def check_complete(self, missing: list[int]) -> None:
        """Check that no part is missing.

        Raises:
            CptError: Some are.
        """
        if not missing:
            return
        numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise CptError(
            f"{len(missing)} of the {len(self.shares)} parts in {self.folder} are not there, or not done, as "
            f"{socket.gethostname()} sees it: {numbers}. Run the command that made the others again: it makes these "
            "alone. If their tasks have ended well, the folder is not on a file system that all machines share."
        )


def left_over(folder: Path) -> list[str]:
    """Return what is to be said, beside an output, of parts that no task or join will need; nothing where none are."""
    if not (folder / PLAN).exists():
        return []
    return [
        f"{folder} holds parts of an earlier command with --tasks, which this output does not need: "
        "remove it, unless they are at work."
    ]


def remove_parts(folder: Path) -> None:
    """Remove parts and plan, the plan last; the folder too, unless somebody else put something into it."""
    # Files of ours alone: the folder is beside the user's output, and may hold what somebody put there.
    for path in folder.glob("part-[0-9][0-9][0-9][0-9][0-9]*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in (EXPERIMENT, PLAN + ".part", PLAN):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
