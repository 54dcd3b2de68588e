"""Training steps of a model in PyTorch on the CPU: one row, of the keys that `param-train --benchmark` writes.

A step is the reference's: router noise, dropout of the preset, cross-entropy with both router losses, gradients clipped to norm 1,
AdamW. Weights are the reference's initialisation, tokens are random.
"""

import argparse
import functools
import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from model import Config, Param


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=Path, required=True, metavar="FILE.toml", help="the model's hyperparameters")
    parser.add_argument("--batch", type=int, required=True, help="rows per batch")
    parser.add_argument("--context", type=int, help="tokens of a row, and positions of the model [default: the preset's]")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16: autocast, weights stay f32")
    parser.add_argument("--dispatch", choices=["capacity", "gather", "grouped"], default="capacity",
                        help="how tokens reach experts: one-hot products that drop what exceeds the capacity, as in the "
                        "reference, or by index, without dropping; grouped: the experts' products in one call")
    parser.add_argument("--compile", action="store_const", const="compiled", help="torch.compile the model and its loss")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-n", "--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    args = parser.parse_args()
    for flag in ("batch", "steps", "threads"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} {getattr(args, flag)}: expected 1 or more")
    return args


class Trainer:
    """The reference's AdamW, in PyTorch's fused implementation: the same numbers in one pass over the parameters."""

    def __init__(self, config, dtype, dispatch, how=None, device="cpu"):
        """`how`: None for eager, "compiled", or "compiled blocks": those and the cross-entropy one by one, since alike ones are
        compiled once."""
        self.dtype, self.device = dtype, device
        with torch.device(device):
            self.model = Param(config, dispatch)
            self.model.initialize()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
        self.noise = functools.partial(torch.randn, device=device)
        self.loss = torch.compile(self.model.loss) if how == "compiled" else self.model.loss
        if how == "compiled blocks":
            for block in self.model.transformer_blocks:
                block.compile()
            self.model.cross_entropy = torch.compile(self.model.cross_entropy)

    def step(self, ids):
        """The loss of a batch [B, T] before the step on it, still on its device."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = self.loss(ids, noise=self.noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def row(preset, dtype, dispatch, how, shape, **more):
    """What names a measurement of batches of `shape`, and `more`."""
    return {
        "engine": ", ".join(filter(None, (f"torch {dtype}", dispatch, how))),
        "preset": preset,
        "test": "train {}x{}".format(*shape),
        "dtype": dtype,
        "batch": shape[0],
        "context": shape[1],
        **more,
    }


def rates(samples):
    """Tokens per second of each step, as rows have them."""
    return {
        "tok/s": round(statistics.median(samples), 2),
        "min": round(min(samples), 2),
        "max": round(max(samples), 2),
        "samples": [round(sample, 2) for sample in samples],
    }


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Config.load(args.preset)
    config.context_length = args.context or config.context_length
    trainer = Trainer(config, args.dtype, args.dispatch, args.compile)
    samples = []
    for i in range(-args.warmup, args.steps):
        ids = torch.randint(config.vocab_size, (args.batch, config.context_length))
        start = time.perf_counter()
        loss = trainer.step(ids).item()
        if i >= 0:
            samples.append(ids.numel() / (time.perf_counter() - start))
        if not math.isfinite(loss):
            sys.exit(f"error: step {i + args.warmup + 1}: the loss is {loss}")
    result = row(
        args.preset.stem, args.dtype, args.dispatch, args.compile, (args.batch, config.context_length),
        threads=args.threads,
        isa=torch.backends.cpu.get_cpu_capability(),
        **rates(samples),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts it in KiB
        loss=loss,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
