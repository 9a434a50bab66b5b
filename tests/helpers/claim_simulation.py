"""Simulated workers share the blocks of a long file: who got how many, what taking one costs, what was taken twice.

    python tests/helpers/claim_simulation.py --rows 10000000 --workers 8 --kills 4

Nothing is drawn: a worker that takes a block sleeps for it, the first of them ten times as long. ``--kills`` of the
workers are killed with SIGKILL at random moments and replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sun.pictures.bulk.claims import Claims, Watch, Worker
from sun.pictures.bulk.run import plan


def work(folder: Path, blocks: int, name: int, workers: int, pause: float) -> None:
    worker = Worker(folder / "workers")
    claims = Claims(folder / "blocks", blocks, worker, Watch(folder / "workers"), name / workers)
    with (folder / f"log-{worker.name}").open("a", buffering=1) as log:
        spent = 0.0
        while True:
            began = time.perf_counter()
            block = claims.take()
            spent += time.perf_counter() - began
            if block is None:
                if claims.finished():
                    break
                time.sleep(0.01)
                continue
            time.sleep(pause)
            began = time.perf_counter()
            claims.finish(block)
            spent += time.perf_counter() - began
            log.write(json.dumps([name, block, spent]) + "\n")
            spent = 0.0
    worker.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10**7)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.002, help="seconds a block takes; the first worker ten times")
    given = parser.parse_args()
    made = plan(given.rows, together=8)
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(number: int) -> multiprocessing.Process:
            pause = given.pause * (10 if number == 0 else 1)
            process = context.Process(target=work, args=(folder, made.blocks, number, given.workers, pause))
            process.start()
            return process  # type: ignore[return-value]

        began = time.monotonic()
        running = {number: start(number) for number in range(given.workers)}
        for _ in range(given.kills):
            time.sleep(rng.uniform(0.1, 0.5))
            number = rng.randrange(given.workers)
            running[number].kill()
            running[number].join()
            running[number] = start(number)
        for process in running.values():
            process.join()
        seconds = time.monotonic() - began
        lines = [json.loads(line) for log in folder.glob("log-*") for line in log.read_text().splitlines()]
        done = sum(len(list(shelf.glob("*.done"))) for shelf in (folder / "blocks").iterdir())
        claims_left = sum(len(list(shelf.glob("*.[0-9]*"))) for shelf in (folder / "blocks").iterdir())
    per = Counter(number for number, _, _ in lines)
    costs = sorted(cost for _, _, cost in lines)
    twice = len(lines) - len({block for _, block, _ in lines})
    print(f"{given.rows:,} rows, {made.blocks:,} blocks of {made.block}, {given.workers} workers, {given.kills} killed")
    print(f"done {done:,} of {made.blocks:,}; finished twice: {twice}; claims left: {claims_left}; {seconds:.1f} s")
    print(f"blocks by worker, the slow one first: {[per[number] for number in range(given.workers)]}")
    print(f"taking and finishing a block: median {costs[len(costs) // 2] * 1e3:.2f} ms, worst {costs[-1] * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
