"""The model in PyTorch on a GPU, and what the GPU can do at best: one JSON object a line, {"step", "rows"} or {"step", "error"},
as soon as a step ends, with rows as `param-bench -o json` writes them.

Weights are random, of the reference's initialisation. Decoding begins with random tokens and goes on with the likeliest, as param-bench
does on a GPU; "read back" waits for each token on the host as well, as someone does who prints it.
"""

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config

from fast import Fast
from model import Config, Param

N_GEN, N_PROMPT = 128, 512


NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


class Steps:
    """Rows, measured step by step."""

    def __init__(self, args):
        self.device, self.repetitions = args.device, args.repetitions
        self.on_gpu = args.device == "cuda"
        self.rows = []

    def sync(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def step(self, name):
        """Adds the rows of a step."""
        getattr(self, name)()

    def run(self, names, out, budget=math.inf):
        """Writes a line for each step, those that would begin after `budget` seconds as skipped. Returns an exit status."""
        failed, begin = 0, time.perf_counter()
        for name in names:
            self.rows, start, ended = [], time.perf_counter(), {}
            if start - begin > budget:
                ended["skipped"] = "no time left"
            else:
                try:
                    if self.on_gpu:
                        torch.cuda.reset_peak_memory_stats()
                    self.step(name)
                    self.sync()
                except Exception:
                    ended["error"] = traceback.format_exc()[-3000:]
                    print(ended["error"], file=sys.stderr)
                    failed += 1
            result = {"step": name, "seconds": round(time.perf_counter() - start, 2), "rows": self.rows, **ended}
            with open(out, "a") if out else open(1, "w", closefd=False) as file:
                print(json.dumps(result), file=file, flush=True)
            if any(word in ended.get("error", "") for word in ("CUDA error", "CUDNN")):
                # Nothing works in a process after it: whoever runs this starts another for the rest.
                return 3
        return 1 if failed else 0


class Bench(Steps):
    def __init__(self, args):
        super().__init__(args)
        self.dtype, self.preset = getattr(torch, args.dtype), args.preset
        self.config = Config.load(args.preset)
        self.config.dropout_rate = 0.0
        self.models = {}

    def param(self, dtype, dispatch="gather"):
        torch.manual_seed(0)
        with torch.device(self.device):
            param = Param(self.config, dispatch)
            param.initialize()
        # The same numbers in every type.
        return param.to(self.dtype).to(dtype).requires_grad_(False).eval()

    def fast(self, key="eager"):
        """One for each way of compiling, which changes a model's blocks."""
        if key not in self.models:
            self.models.clear()
            self.models[key] = Fast(self.param(self.dtype)).requires_grad_(False).eval()
        return self.models[key]

    def compiled_blocks(self):
        is_new = "blocks" not in self.models
        model = self.fast("blocks")
        if is_new:
            for block in model.blocks:
                block.compile(dynamic=False, fullgraph=True)
        return model

    def seconds(self, run, repetitions=None):
        run()
        samples = []
        for _ in range(repetitions or self.repetitions):
            self.sync()
            start = time.perf_counter()
            run()
            self.sync()
            samples.append(time.perf_counter() - start)
        return samples

    def row(self, engine, test, n_token, samples, dtype=None, **more):
        rates = [n_token / s for s in samples]
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else None
        self.rows.append({
            "engine": f"torch {NAMES[dtype or self.dtype]}, {engine}",
            "model": self.preset.stem,
            "device": torch.cuda.get_device_name() if self.on_gpu else "cpu",
            "test": test,
            "tok/s": round(statistics.median(rates), 2),
            "min": round(min(rates), 2),
            "max": round(max(rates), 2),
            "samples": [round(rate, 2) for rate in rates],
            "peak_bytes": peak,
            **more,
        })

    def ceiling(self, test, unit, amount, samples):
        """`amount` of `unit` in each of the times."""
        values = [amount / s for s in samples]
        self.rows.append({"test": test, unit: round(statistics.median(values), 3),
                          "min": round(min(values), 3), "max": round(max(values), 3)})

    def captured(self, run):
        """The same as a CUDA graph."""
        if not self.on_gpu:
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def ids(self, *shape):
        return torch.randint(self.config.vocab_size, shape, device=self.device)

    # Steps.

    def ceilings(self):
        n = 2 << 30 if self.on_gpu else 64 << 20
        a = torch.randint(256, (n,), dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        self.ceiling("device copy, read + write", "GB/s", 2 * n / 1e9, self.seconds(lambda: b.copy_(a), 20))
        words = a.view(torch.int32)
        self.ceiling("device read, max of int32", "GB/s", n / 1e9, self.seconds(lambda: words.max(), 20))
        del a, b, words
        m = 8192 if self.on_gpu else 512
        x, y = (torch.randn(m, m, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        z = torch.empty_like(x)
        self.ceiling(f"matmul {m}^3 bf16", "TFLOP/s", 2 * m**3 / 1e12, self.seconds(lambda: torch.matmul(x, y, out=z), 20))
        small = torch.zeros(1, device=self.device)

        def launches(n):
            for _ in range(n):
                small.add_(1)

        us = lambda n, run: [1 / (s / n * 1e6) for s in self.seconds(run, 10)]  # amount 1 over this: microseconds
        self.ceiling("launch from PyTorch", "us", 1, us(1000, lambda: launches(1000)))
        replay = self.captured(lambda: launches(1000))
        self.ceiling("kernel in a CUDA graph", "us", 1, us(1000, replay))
        one = self.captured(lambda: launches(1))

        def waited():
            for _ in range(100):
                one()
                self.sync()

        self.ceiling("graph of one kernel, waited for", "us", 1, us(100, waited))
        logits = torch.zeros(self.config.vocab_size, device=self.device)
        host = torch.empty(self.config.vocab_size, pin_memory=self.on_gpu)

        def reads():
            for _ in range(100):
                host.copy_(logits)

        self.ceiling(f"{logits.numel()} f32 read back", "us", 1, us(100, reads))

    def check(self):
        """What is measured computes the model: logits beside the plain one's in f32; and how its tokens spread over experts."""
        fast, plain = self.fast(), self.param(torch.float32)
        ids = self.ids(8, 64)
        want = plain(ids[:, :16])[:, -1].float()
        places = torch.arange(16, device=self.device)

        def error(name, got, want):
            got = got.float()
            off = ((got - want).norm(dim=-1) / want.norm(dim=-1)).tolist()
            self.rows.append({"test": f"check {name}", "median error": statistics.median(off), "max error": max(off),
                              "same choice": (got.argmax(-1) == want.argmax(-1)).float().mean().item()})

        for dispatch in ("all", "loop", "grouped"):
            try:
                error(f"prefill {dispatch}", fast(ids[:, :16], places, fast.new_cache(8, 16), dispatch, prefill=True), want)
            except Exception as e:
                self.rows.append({"test": f"check prefill {dispatch}", "error": repr(e)[:500]})
        cache = fast.new_cache(8, 16)
        for i in range(16):
            got = fast(ids[:, i : i + 1], places[i : i + 1], cache, "all")
        error("decode all", got, want)
        cache = fast.new_cache(1, 16)
        for i in range(16):
            got = fast(ids[:1, i : i + 1], places[i : i + 1], cache, "chosen")
        error("decode chosen", got, want[:1])
        plain(self.ids(4, N_PROMPT))
        shares = [block.moe.chosen.flatten().bincount(minlength=self.config.num_experts).float()
                  for block in plain.transformer_blocks if hasattr(block.moe, "chosen")]
        if shares:
            shares = torch.stack(shares) / (4 * N_PROMPT)
            self.rows.append({"test": "share of tokens an expert gets", "min": shares.min().item(), "max": shares.max().item()})

    def decode(self, engine, model, dispatch, batch=1, depth=0, graph=True, step=None):
        cache = model.new_cache(batch, depth + N_GEN)
        for part in cache:
            part.normal_()
        ids, start = self.ids(batch, 1), self.ids(batch, 1)
        position = torch.full((1,), depth, device=self.device)
        step = step or model.step

        def one():
            step(ids, position, cache, dispatch)

        one()  # compiles
        run = self.captured(one) if graph else one

        def all_tokens():
            ids.copy_(start)
            position.fill_(depth)
            for _ in range(N_GEN):
                run()

        def read_back():
            ids.copy_(start)
            position.fill_(depth)
            for _ in range(N_GEN):
                run()
                ids.tolist()

        test = f"tg{N_GEN}" + (f" x {batch}" if batch > 1 else "") + (f" @ d{depth}" if depth else "")
        more = {"n_prompt": 0, "n_gen": N_GEN, "depth": depth, "sequences": batch, "dispatch": dispatch}
        self.row(engine, test, N_GEN * batch, self.seconds(all_tokens), **more)
        if batch == 1 and depth == 0:
            self.row(f"{engine}, read back", test, N_GEN, self.seconds(read_back), **more)

    def decode_eager(self):
        self.decode("eager", self.fast(), "chosen", graph=False)

    def decode_graph(self):
        self.decode("CUDA graph", self.fast(), "chosen")
        self.decode("CUDA graph", self.fast(), "chosen", depth=512)

    def batch_graph(self):
        for batch in (8, 64):
            for dispatch in ("all", "grouped"):
                self.decode("CUDA graph", self.fast(), dispatch, batch)

    def decode_blocks(self):
        self.decode("compiled blocks, CUDA graph", self.compiled_blocks(), "chosen")

    def batch_blocks(self):
        for dispatch in ("all", "grouped"):
            self.decode("compiled blocks, CUDA graph", self.compiled_blocks(), dispatch, 64)

    def decode_compiled(self):
        model = self.fast("whole")
        self.decode("compiled, CUDA graph", model, "chosen",
                    step=torch.compile(model.step, dynamic=False, fullgraph=True))

    def batch_compiled(self):
        model = self.fast("whole")
        self.decode("compiled, CUDA graph", model, "all", 64, step=torch.compile(model.step, dynamic=False, fullgraph=True))

    def prefill(self, engine, model, dispatch, batch, graph):
        ids, places = self.ids(batch, N_PROMPT), torch.arange(N_PROMPT, device=self.device)
        cache = model.new_cache(batch, N_PROMPT)

        def run():
            return model(ids, places, cache, dispatch, prefill=True)

        run()
        test = f"pp{N_PROMPT}" + (f" x {batch}" if batch > 1 else "")
        self.row(engine, test, batch * N_PROMPT, self.seconds(self.captured(run) if graph else run),
                 n_prompt=N_PROMPT, n_gen=0, depth=0, sequences=batch, dispatch=dispatch)

    def prefill_eager(self):
        for batch in (1, 8):
            for dispatch in ("loop", "grouped"):
                self.prefill("eager", self.fast(), dispatch, batch, graph=False)

    def prefill_graph(self):
        for batch in (1, 8):
            self.prefill("CUDA graph", self.fast(), "grouped", batch, graph=True)

    def prefill_blocks(self):
        for batch in (1, 8):
            self.prefill("compiled blocks, CUDA graph", self.compiled_blocks(), "grouped", batch, graph=True)

    def reference(self):
        """As the reference generates: no cache, one-hot dispatch with the capacity rule, logits of every position."""
        n_gen = 32
        for dtype in dict.fromkeys((self.dtype, torch.float32)):
            model = self.param(dtype, "capacity")
            more = {"dispatch": "capacity", "dtype": dtype}
            for batch in (1, 8):
                ids = self.ids(batch, N_PROMPT)
                test = f"pp{N_PROMPT}" + (f" x {batch}" if batch > 1 else "")
                self.row("reference's way", test, batch * N_PROMPT, self.seconds(lambda: model(ids), 3),
                         n_prompt=N_PROMPT, n_gen=0, depth=0, sequences=batch, **more)
            ids = self.ids(1, n_gen)

            def generate():
                for i in range(n_gen):
                    model(ids[:, : i + 1])[:, -1].argmax(-1).tolist()

            self.row("reference's way", f"tg{n_gen}", n_gen, self.seconds(generate, 3),
                     n_prompt=0, n_gen=n_gen, depth=0, sequences=1, **more)


STEPS = ["ceilings", "check", "decode_graph", "prefill_eager", "prefill_graph", "batch_graph", "decode_eager", "reference",
         "decode_blocks", "batch_blocks", "prefill_blocks", "decode_compiled", "batch_compiled"]


def arguments(doc, repetitions):
    """A parser of the flags that every script of steps has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try this script")
    parser.add_argument("--out", type=Path, help="file to append to [default: standard output]")
    parser.add_argument("-r", "--repetitions", type=int, default=repetitions, help="[default: %(default)s]")
    return parser


def main():
    parser = arguments(__doc__, repetitions=5)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} [default: all]")
    parser.add_argument("--preset", type=Path, required=True, metavar="FILE.toml", help="the model's hyperparameters")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    args = parser.parse_args()
    unknown = set(args.steps) - set(STEPS)
    if unknown:
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
    # With it, the compiler turns products with one row into sums it fuses with the gathering of experts, and searches its tiles.
    torch._inductor.config.coordinate_descent_tuning = args.device == "cuda"
    # A block is compiled anew for each batch and dispatch.
    torch._dynamo.config.recompile_limit = 64
    with torch.inference_mode():
        sys.exit(Bench(args).run(args.steps or STEPS, args.out))


if __name__ == "__main__":
    main()
