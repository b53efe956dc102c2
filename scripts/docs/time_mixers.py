"""Measure what every mixer costs against its length; writes ``docs/data/timings.json``, which the documentation draws."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # read when torch loads: spinning teams of threads starve each other

import argparse

import torch
from sitegen.timings import CACHE, load, measure, save

from attnlab import list_mixers


def main() -> None:
    parser = argparse.ArgumentParser(description="Time mixers in interleaved pairs with softmax attention.")
    parser.add_argument("names", nargs="*", help="mixers; all without any")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with one, what else the machine does matters least")
    parser.add_argument("--seconds", type=float, default=0.8, help="about how long one length takes in one direction")
    parser.add_argument("--note", default="", help="what a reader of the times should know; the pages print it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.names or list_mixers():  # each is kept as soon as it is measured
        data = measure([name], seconds=options.seconds, say=lambda line: print(line, flush=True))
        known = load()["mixers"] if CACHE.exists() else {}
        save(data | {"mixers": known | data["mixers"], "note": options.note})
    print(f"wrote {CACHE}")


if __name__ == "__main__":
    main()
