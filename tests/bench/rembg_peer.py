"""rembg as a user of it would call it on many files: `rembg_peer PROCESSES`, its weights in `U2NET_HOME`.

Each line on standard input names a folder: its files are made cut-outs beside them, and a line of JSON tells how long
that took and the most memory that a process ever had. By default rembg uses all cores for one image; of several
processes each has one.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path

SESSION = {}


def prepare() -> None:
    import rembg  # noqa: PLC0415 - each process by itself

    SESSION["remove"], SESSION["session"] = rembg.remove, rembg.new_session("u2netp")


def done(path: Path) -> int:
    path.with_suffix(".png").write_bytes(SESSION["remove"](path.read_bytes(), session=SESSION["session"]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    processes = int(sys.argv[1])
    if processes > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # rembg takes the number of threads from it
    with multiprocessing.get_context("spawn").Pool(processes, prepare) as pool:
        for line in sys.stdin:
            paths = sorted(Path(line.strip()).glob("*.jpg"))
            began = time.perf_counter()
            memory = pool.map(done, paths, chunksize=1)
            print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": max(memory) * 1024}), flush=True)


if __name__ == "__main__":
    main()
