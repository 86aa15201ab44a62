"""`python -m benchmarks [--only NAME ...] [--device cuda] [--nanogpt DIR --text FILE]`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from benchmarks.behaviour import behaviour
from benchmarks.decoding import against_generate
from benchmarks.family import family
from benchmarks.harness import Line, update_pages, write
from benchmarks.nanogpt import against_nanogpt
from benchmarks.training_speed import (
    against_attention,
    against_peers,
    family_against_attention,
    share_of_peak,
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ("peers", "attention", "peak", "decode", "nanogpt", "mixers", "family", "parity",
             "behaviour")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, help="about 1 MB of English text")
    parser.add_argument("--entries", nargs="+", help="family: only these; the others' rows stay")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in options.only:
        lines: list[Line] = []
        if name == "family":
            print(family(options.device, 1.0, options.entries), flush=True)
            continue
        if name == "parity":
            from benchmarks.parity import run as parity  # needs transformers
            parity(Path(__file__).parent)
            continue
        if name == "behaviour":
            print(behaviour(), flush=True)
            continue
        if name == "nanogpt":
            if not (options.nanogpt and options.text):
                print("nanogpt: left out; it needs --nanogpt DIR and --text FILE")
                continue
            lines = against_nanogpt(options.nanogpt, options.text, options.rounds)
        else:
            run = {"peers": against_peers, "attention": against_attention,
                   "peak": share_of_peak, "decode": against_generate,
                   "mixers": family_against_attention}[name]
            try:
                lines = run(options.device, options.rounds)
            except ImportError as error:
                print(f"{name}: left out, {error}; pip install -e '.[bench]' brings the peers")
                continue
        notes = [f"{line.what}: " + ", ".join(f"{op} by {path}" for op, path in line.paths.items())
                 for line in lines if line.paths]
        print(write(name, lines, options.device, notes), flush=True)
    if options.device == "cpu":
        update_pages()


if __name__ == "__main__":
    main()
