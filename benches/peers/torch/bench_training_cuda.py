"""Training steps of a model in PyTorch on a GPU: one JSON object a line, {"step", "rows"} or {"step", "error"}, as soon as a step ends,
with rows as bench_training.py writes them.

A STEP is PRESET:DISPATCH:HOW, such as param-0.5b:gather:eager. DISPATCH is capacity (the reference's one-hot products), gather or
grouped (by index, nothing dropped), dense for a model without experts; HOW is eager, blocks (each block and the cross-entropy
compiled one by one) or compiled (the model and its loss as one). Each takes the largest of the batches that fits in memory; one that
does not, or that cannot be compiled, has a row with `error` instead of `tok/s`. What is in a training step, bench_training.py says;
here under bf16 autocast, weights and the optimizer in f32, tokens random, losses read when all steps are done.
"""

import gc
import math
import os
import sys
import time
from pathlib import Path

# Before PyTorch takes any memory: what one batch leaves is of use to the next, whatever their sizes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch._dynamo

from bench_cuda import Steps, arguments
from bench_training import Trainer, rates, row
from model import Config

STEPS = [
    f"{model}:{how}"
    for how in ("eager", "blocks", "compiled")
    for model in ("param-124m:dense", "param-0.5b:grouped", "param-0.5b:gather", "param-0.5b:capacity")
]
DISPATCHES = ["capacity", "gather", "grouped", "dense"]
HOWS = {"eager": None, "blocks": "compiled blocks", "compiled": "compiled"}
# Steps before the clock starts: the first compiles, and the second again with sizes that turned out not to be constant.
WARMUP = 4
OUT_OF_MEMORY = "out of memory"
COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")


def failure(error):
    """What to call it in a row."""
    text = str(error)
    if "out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text:  # compiled, not always an OutOfMemoryError
        return OUT_OF_MEMORY
    where = "torch.compile" if type(error).__module__.startswith(COMPILER) else "failed"
    return f"{where}: {type(error).__name__}: {text[:300]}"


class TrainingBench(Steps):
    def __init__(self, args):
        super().__init__(args)
        self.folder, self.context = args.presets, args.context
        self.batches = sorted(args.batches, reverse=True)

    def step(self, name):
        preset, dispatch, how = name.split(":")
        config = Config.load(self.folder / f"{preset}.toml")
        config.context_length = self.context or config.context_length
        dispatch = None if dispatch == "dense" else dispatch
        device = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        for batch in self.batches:
            # Here no exception holds the frames of what failed, and their tensors.
            self.forget()
            shape = (batch, config.context_length)
            names = row(preset, "bf16", dispatch, HOWS[how], shape, device=device)
            try:
                measured = self.measured(config, dispatch, HOWS[how], shape)
            except Exception as e:
                measured = {"error": failure(e)}
                if measured["error"] != OUT_OF_MEMORY:
                    self.rows.append({**names, **measured})
                    raise
            self.rows.append({**names, **measured})
            if "error" not in measured:
                break

    def forget(self):
        torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def measured(self, config, dispatch, how, shape):
        """What a row has beside its names."""
        torch.manual_seed(0)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(config, "bf16", dispatch, how, self.device)
        losses = []

        def step():
            losses.append(trainer.step(torch.randint(config.vocab_size, shape, device=self.device)))

        start = time.perf_counter()
        for _ in range(WARMUP):
            step()
        self.sync()
        warmup = time.perf_counter() - start
        samples = [math.prod(shape) / seconds for seconds in self.seconds(step)]
        losses = torch.stack(losses).tolist()
        if not all(map(math.isfinite, losses)):
            raise ArithmeticError(f"losses {losses}")
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else None
        return {**rates(samples), "peak_bytes": peak, "loss": losses[-1], "warmup_seconds": round(warmup, 2)}

    def seconds(self, step):
        """Of each of the repetitions, one right after the other."""
        if not self.on_gpu:
            ends = [time.perf_counter()]
            for _ in range(self.repetitions):
                step()
                ends.append(time.perf_counter())
            return [end - start for start, end in zip(ends, ends[1:])]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.repetitions + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        self.sync()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]


def main():
    parser = arguments(__doc__, repetitions=10)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"[default: {' '.join(STEPS)}]")
    parser.add_argument("--presets", type=Path, required=True, metavar="FOLDER", help="where the models' hyperparameters are, PRESET.toml")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[8, 16, 32], metavar="LIST",
                        help="rows per batch [default: 8,16,32]")
    parser.add_argument("--context", type=int, help="tokens of a row, and positions of the model [default: the preset's]")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="after which no step begins [default: none]")
    args = parser.parse_args()
    args.steps = args.steps or STEPS
    for step in args.steps:
        preset, dispatch, how = (step.split(":") + [None] * 3)[:3]
        if dispatch not in DISPATCHES or how not in HOWS:
            parser.error(f"{step}: expected PRESET:DISPATCH:HOW")
        if not (args.presets / f"{preset}.toml").exists():
            parser.error(f"{step}: no {preset}.toml in {args.presets}")
    # Models, batches and ways to dispatch share functions.
    torch._dynamo.config.recompile_limit = 64
    sys.exit(TrainingBench(args).run(args.steps, args.out, args.budget))


if __name__ == "__main__":
    main()
