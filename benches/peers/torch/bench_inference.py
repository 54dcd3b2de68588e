"""Prefill and decode of a checkpoint in PyTorch on the CPU: rows as `param-bench -o json` writes them, or logits to compare.

By default the way a user would write it: key/value cache, experts by gathering, logits of the last token. With --reference
the way the reference generates: no cache, one-hot dispatch with the capacity rule, logits of every position.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from model import Param


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with model.safetensors and config.json")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--reference", action="store_true", help="generate as the reference does")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, help="tokens to prefill; 0 for none")
    parser.add_argument("-n", "--n-gen", type=int, default=128, help="tokens to decode; 0 for none")
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens in the context before decoding")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--check", metavar="IDS", help="instead of measuring: run these tokens, such as 5,6,7")
    parser.add_argument("--decode", type=int, default=0, help="of the tokens to check, run the last N one at a time")
    parser.add_argument("--logits", type=Path, help="where to write their logits: `logits`, f32 [n_token, n_vocab]")
    return parser.parse_args()


def prefill(model, ids, reference):
    model(ids, caches=None if reference else model.new_caches(), last_only=not reference)


def decode(model, ids, depth, reference):
    """Tokens after the first `depth`, one at a time; seconds that took."""
    caches = None
    if not reference:
        caches = model.new_caches()
        if depth > 0:
            model(ids[:, :depth], caches=caches, last_only=True)
    start = time.perf_counter()
    for i in range(depth, ids.shape[1]):
        if reference:
            model(ids[:, : i + 1])
        else:
            model(ids[:, i : i + 1], caches=caches, last_only=True)
    return time.perf_counter() - start


def row(args, test, n_token, samples):
    is_decode = test == "tg"
    depth = args.depth if is_decode else 0
    return {
        "engine": f"torch {args.dtype}{', reference' if args.reference else ''}",
        "model": args.checkpoint.name,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "test": f"{test}{n_token}" + (f" @ d{depth}" if depth else ""),
        "n_prompt": 0 if is_decode else n_token,
        "n_gen": n_token if is_decode else 0,
        "depth": depth,
        "tok/s": round(statistics.median(samples), 2),
        "min": round(min(samples), 2),
        "max": round(max(samples), 2),
        "samples": [round(sample, 2) for sample in samples],
    }


def check(args, model):
    """All logits: of the prompt in one pass, then of the tokens after it one at a time."""
    from safetensors.torch import save_file

    ids = torch.tensor([[int(id) for id in args.check.split(",")]])
    caches = None if args.reference else model.new_caches()
    n_prompt = ids.shape[1] - args.decode
    steps = ([ids[:, :n_prompt]] if n_prompt > 0 else []) + list(ids[:, n_prompt:].split(1, dim=1))
    if args.reference:
        steps = [ids]
    logits = torch.cat([model(step, caches=caches)[0] for step in steps if step.numel() > 0])
    save_file({"logits": logits.float().contiguous()}, args.logits)


@torch.inference_mode()
def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    model = Param.load(args.checkpoint, "capacity" if args.reference else "gather")
    if args.dtype == "bf16":
        model = model.bfloat16()
    if args.check:
        return check(args, model)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for test, n_token, depth in (("pp", args.n_prompt, 0), ("tg", args.n_gen, args.depth)):
        if n_token == 0:
            continue
        samples = []
        for _ in range(args.repetitions + 1):
            ids = torch.randint(model.config.vocab_size, (1, depth + n_token), generator=generator)
            if test == "tg":
                seconds = decode(model, ids, depth, args.reference)
            else:
                start = time.perf_counter()
                prefill(model, ids, args.reference)
                seconds = time.perf_counter() - start
            samples.append(n_token / seconds)
        rows.append(row(args, test, n_token, samples[1:]))  # the first one warms up
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
