"""Where the time of an import goes, by package.

usage: python benchmarks/imports.py ["from nemo.collections import llm"]
"""

import re
import subprocess
import sys
import time
from collections import Counter

LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def main() -> None:
    statement = sys.argv[1] if len(sys.argv) > 1 else "from nemo.collections import llm"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", statement], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    own: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for microseconds, module in LINE.findall(done.stderr):
        package = module.partition(".")[0]
        own[package] += int(microseconds)
        modules[package] += 1
    total = sum(own.values())
    print(f"{statement}: {seconds:.1f} s, {sum(modules.values()):,} modules")
    print("| package | seconds | share | modules |\n|---|---|---|---|")
    for package, microseconds in own.most_common(12):
        print(f"| {package} | {microseconds / 1e6:.1f} | {microseconds / total:.0%} | {modules[package]:,} |")


if __name__ == "__main__":
    main()
