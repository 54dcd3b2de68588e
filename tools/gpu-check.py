"""Everything that needs a GPU, in one run: tests, golden numbers, param-bench, training, PyTorch's peers. Steps (default: the first three):

  tests   the test binaries, training's among them; golden cases through param-run
  bench   param-bench on random weights in several formats; logits beside the CPU's
  peers   what the GPU can do at best, and the model in PyTorch
and, only where asked for:
  training        param-train --benchmark of several models and types, a minute at most each
  training-peers  training steps of the models in PyTorch, in bf16: eager ones first, compiled ones may take minutes each
  profile         time and bytes of each kernel, by ncu
  sanitize        memory errors and races, by compute-sanitizer

Training and PyTorch in one run, so that the table has their ratio: `run.sh training training-peers --budget 500`.

Writes gpu-DATE.json after every step, so that a run that is cut short leaves what it had; a step that fails or runs out of time is
recorded and the next one begins. tools/gpu-check.sh makes the folder that this runs in.
"""

import argparse
import csv
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROUPS = ["tests", "bench", "peers", "training", "training-peers", "profile", "sanitize"]
FORMATS = ["f16", "default", "q4_k", "q8_0", "bf16", "f32"]  # in the order of what matters, in case time runs out
PEERS = {  # seconds each may take
    "ceilings": 40, "check": 50, "decode_graph": 40, "prefill_eager": 40, "prefill_graph": 40, "batch_graph": 50, "decode_eager": 40,
    "decode_blocks": 90, "batch_blocks": 90, "prefill_blocks": 90, "reference": 60, "decode_compiled": 150, "batch_compiled": 150,
}
# PRESET:DTYPE:ROWS[:OPTIMIZER[:MATMUL]] in that order too; batches of up to 65,536 tokens. AdamW is what PyTorch has. MATMUL is mma or wgmma,
# with +cublaslt where dense products are to be the library's that PyTorch brings, with +atomics where sums are added in any order.
TRAINING = [
    "param-0.5b:bf16:32", "param-0.5b:bf16:32:adamw:wgmma", "param-0.5b:bf16:32:adamw:mma+cublaslt", "param-0.5b:bf16:32:adamw:wgmma+cublaslt",
    "param-0.5b:bf16:32:adamw:mma+atomics", "param-124m:bf16:32", "param-124m:bf16:32:adamw:wgmma", "param-124m:bf16:32:adamw:mma+cublaslt",
    "param-0.5b:bf16:16", "param-0.5b:bf16:16:adamw:wgmma", "param-0.5b:bf16:32:muon", "param-mid:bf16:256", "param-mid:bf16:256:adamw:wgmma",
    "param-0.5b:tf32:16", "param-0.5b:tf32:16:adamw:mma+cublaslt",
    "param-mid:tf32:256", "param-mid:f32:256", "param-mini:bf16:256", "param-tiny:bf16:512", "param-0.5b:f32:16", "param-0.5b:bf16:auto",
]
# PRESET:DISPATCH:HOW of bench_training_cuda.py, and the seconds that each way may take, with a batch or two that turn out too large.
TRAINING_PEERS = [
    f"{model}:{how}"
    for how in ("eager", "blocks", "compiled")
    for model in ("param-124m:dense", "param-0.5b:grouped", "param-0.5b:gather", "param-0.5b:capacity")
]
WAYS = {"eager": 60, "blocks": 150, "compiled": 240}
# llm.c's own figure for GPT-2's sizes on an H100, in bf16 with weights and moments in f32.
LLM_C = "44-50%"
QUERY = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,memory.total,memory.used"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="STEP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="where the JSON goes [default: .]")
    parser.add_argument("--budget", type=float, default=345, metavar="SECONDS", help="for all steps together [default: 345]")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of weights to measure [default: %(default)s]")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAMES", help="steps of the peers [default: %(default)s]")
    parser.add_argument("--training", default=",".join(TRAINING), metavar="LIST",
                        help="PRESET:DTYPE:ROWS[:OPTIMIZER[:MATMUL]], ROWS also auto, OPTIMIZER adamw or muon, MATMUL mma or, for bf16 on "
                             "compute capability 9.0, wgmma, and with +cublaslt or +atomics [default: %(default)s]")
    parser.add_argument("--training-steps", type=int, default=10, metavar="N", help="timed steps of each of them [default: %(default)s]")
    parser.add_argument("--training-peers", default=",".join(TRAINING_PEERS), metavar="LIST",
                        help="PRESET:DISPATCH:HOW, see torch/bench_training_cuda.py [default: %(default)s]")
    parser.add_argument("--only-tests", default="", metavar="WORDS",
                        help="of `tests` only the lines of tests.txt with one of these words, such as training")
    parser.add_argument("--batches", default="1,8,64", help="numbers of sequences decoded together [default: %(default)s]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try this script")
    parser.add_argument("--preset", default="param-0.5b", help="the model that is measured [default: %(default)s]")
    args = parser.parse_args()
    args.groups = args.groups or GROUPS[:3]
    for given, known in ((args.groups, GROUPS), (args.peers.split(","), PEERS), (args.formats.split(","), FORMATS)):
        for name in given:
            if name not in known:
                parser.error(f"{name}: expected of {', '.join(known)}")
    for flag, n_part in (("training", (3, 4, 5)), ("training_peers", (3,))):
        for name in getattr(args, flag).split(","):
            preset, *parts = name.split(":")
            if 1 + len(parts) not in n_part or not (HERE / f"presets/{preset}.toml").exists() or flag == "training_peers" and parts[1] not in WAYS:
                parser.error(f"--{flag.replace('_', '-')}: {name}: see --help")
    return args


def told(command):
    """A command as it is recorded: paths from the folder that all of this lies in, whatever machine that was on."""
    return shlex.join(str(word) for word in command).replace(f"{HERE}/", "").replace(sys.executable, "python3")


class Run:
    def __init__(self, args):
        self.args = args
        self.start = time.monotonic()
        now = datetime.now(timezone.utc)
        self.path = args.out.resolve() / now.strftime("gpu-%Y-%m-%d-%H%M%S.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = HERE / "about.json"
        self.report = {
            "date": now.isoformat(timespec="seconds"),
            "command": told(sys.argv),
            "built": json.loads(about.read_text()) if about.exists() else None,
            "card": self.card(),
            "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
            "versions": self.versions(),
            "steps": [],
        }
        # What the driver makes of PTX, kept from one process to the next.
        os.environ.setdefault("CUDA_CACHE_PATH", str(HERE / "compute-cache"))
        os.environ.setdefault("CUDA_CACHE_MAXSIZE", str(4 << 30))
        os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
        self.work = HERE / "work"
        self.work.mkdir(exist_ok=True)

    def card(self):
        """What nvidia-smi says, clocks among it; read, never set."""
        try:
            line = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
                                  capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
            return dict(zip(QUERY.split(","), (field.strip() for field in line.split(","))))
        except Exception as e:
            return {"error": repr(e)}

    def versions(self):
        found = {}
        for name in ("torch", "triton", "numpy"):
            try:
                found[name] = version(name)
            except Exception as e:
                found[name] = repr(e)
        for name, command in (
            ("nvcc", ["nvcc", "--version"]),
            ("param-run", [HERE / "bin/param-run", "--version"]),
        ):
            try:
                out = subprocess.run(command, capture_output=True, text=True, timeout=60)
                found[name] = (out.stdout.strip() or out.stderr.strip()).splitlines()[-1]
            except Exception as e:
                found[name] = repr(e)[:200]
        return found

    def left(self):
        return self.args.budget - (time.monotonic() - self.start)

    def save(self):
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        part = self.path.with_suffix(".partial")
        part.write_text(json.dumps(self.report, indent=1))
        part.replace(self.path)

    def command(self, name, command, limit, env=None, keep=4000, save=True):
        """Runs a command within its limit and what is left of the budget. Returns its step, with `stdout` besides what is saved."""
        command = [str(c) for c in command]
        step = {"name": name, "command": told(command), "rc": None}
        limit = min(limit, self.left())
        stdout = ""
        start = time.monotonic()
        if limit < 3:
            step["skipped"] = "no time left"
        else:
            try:
                # A session of its own, so that what it started ends with it.
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                                           cwd=self.work, env={**os.environ, **(env or {})}, start_new_session=True)
                try:
                    stdout, stderr = process.communicate(timeout=limit)
                except subprocess.TimeoutExpired:
                    step["timed_out"] = round(limit, 1)
                    os.killpg(process.pid, signal.SIGKILL)
                    stdout, stderr = process.communicate()
                step["rc"] = process.returncode
                if step["rc"] != 0:
                    step["stdout"] = stdout[-keep:]
                if stderr:
                    step["stderr"] = stderr[-keep:]
            except Exception:
                step["error"] = traceback.format_exc()[-keep:]
        step["seconds"] = round(time.monotonic() - start, 2)
        if save:
            self.add(step)
        return step, stdout

    def add(self, step):
        self.report["steps"].append(step)
        self.save()
        mark = "ok" if step.get("rc") == 0 else "skipped" if "skipped" in step else "timed out" if "timed_out" in step else "FAILED"
        print(f"[{self.report['seconds']:6.1f} s] {step['name']}: {mark} {step.get('note', '')}", flush=True)
        if mark in ("FAILED", "timed out"):
            text = "\n".join(step.get(key, "") for key in ("stdout", "stderr", "error")).strip()
            print("\n".join("    " + line[:200] for line in text.splitlines()[-12:]), flush=True)

    def guarded(self, name, function):
        """A step in this process, or several: what it raises is recorded."""
        try:
            function()
        except Exception:
            self.add({"name": name, "rc": None, "error": traceback.format_exc()[-4000:]})

    def device(self, device=None):
        """Flags of our tools."""
        return [] if self.args.device == "cpu" else ["--device", device or "cuda"]


# Tests.


def first_run(run):
    """The driver translates PTX when a module is first loaded, and keeps the result: what a user waits for once, and each time."""
    for case in sorted(path for path in (HERE / "golden").iterdir() if (path / "model.safetensors").exists())[:1]:
        gguf = run.work / f"golden-{case.name}.gguf"
        run.command(f"golden {case.name}: convert", [HERE / "bin/param-convert", case, gguf, "--quant", "f32"], 30)
        for which in ("first start", "second start"):
            command = [HERE / "bin/param-run", "-m", gguf, "--tokens", "5,6,7", "-n", 4, "--temp", 0, "--ignore-eos", "--print-tokens", *run.device()]
            step, _ = run.command(which, command, 150, save=False)
            step["note"] = f"{step['seconds']} s from start to end"
            run.add(step)


def test_binaries(run):
    env = {"PARAM_GOLDEN": str(HERE / "golden"), "PARAM_BIN": str(HERE / "bin"), "RUST_BACKTRACE": "0"}
    if run.args.device == "cuda":
        env["PARAM_GPU"] = "1"
    words = run.args.only_tests.split(",")
    for line in (HERE / "tests.txt").read_text().splitlines():
        if not any(word in line.split("--skip")[0] for word in words):
            continue
        file, *filters = line.split()
        step, stdout = run.command(f"test {file} {' '.join(filters)}".strip(), [HERE / "tests" / file, *filters], 75, env, keep=8000, save=False)
        step["note"] = next((line for line in reversed(stdout.splitlines()) if line.startswith("test result")), "")
        step["note"] = step["note"].removeprefix("test result: ")
        run.add(step)


def logits_of(run, model, tokens, out, device, limit, extra=()):
    command = [HERE / "bin/param-run", "-m", model, "--tokens", ",".join(map(str, tokens)), "--logits", out, *run.device(device), *extra]
    step, _ = run.command(f"logits {Path(model).name} {device}", command, limit, save=False)
    if step["rc"] != 0:
        raise RuntimeError(f"{step}")
    from safetensors.numpy import load_file

    return load_file(out)["logits"]


def golden(run):
    """Logits of every golden sequence, and greedy text, from param-run on the GPU, in F32."""
    import numpy as np

    for case in sorted((HERE / "golden").iterdir()):
        if not (case / "eval.npz").exists():
            continue
        gguf = run.work / f"golden-{case.name}.gguf"
        convert, _ = run.command(f"golden {case.name}: convert", [HERE / "bin/param-convert", case, gguf, "--quant", "f32"], 30, save=False)
        if convert["rc"] != 0:
            run.add(convert)
            continue
        arrays = np.load(case / "eval.npz")
        step = {"name": f"golden {case.name}", "rc": 0, "errors": {}, "bound": 1e-3}
        start = time.monotonic()
        for name in [name for name in arrays if name.endswith(".input_ids")]:
            test = name.removesuffix(".input_ids")
            ids = arrays[name].reshape(-1).tolist()
            try:
                got = logits_of(run, gguf, ids, run.work / "logits.safetensors", "cuda", 20)
                error = float(np.abs(got - arrays[f"{test}.logits"].reshape(got.shape)).max())
                step["errors"][test] = error
                step["rc"] = step["rc"] if error <= step["bound"] else 1
            except Exception as e:
                step["errors"][test] = repr(e)[:1500]
                step["rc"] = 1
            texts = {}
            for device in ("cuda", "cpu"):
                command = [HERE / "bin/param-run", "-m", gguf, "--tokens", ",".join(map(str, ids[:8])), "-n", 32, "--temp", 0, "--ignore-eos",
                           "--print-tokens", *run.device(device)]
                texts[device] = run.command("greedy", command, 20, save=False)[1].strip()
            step.setdefault("greedy", {})[test] = {"same": texts["cuda"] == texts["cpu"] != "", **texts}
            step["rc"] = step["rc"] if texts["cuda"] == texts["cpu"] != "" else 1
        step["seconds"] = round(time.monotonic() - start, 2)
        worst = [e if isinstance(e, float) else float("inf") for e in step["errors"].values()]
        step["note"] = f"{len(worst)} sequences, logits off by {max(worst, default=0):.1e} at most, bound {step['bound']:.0e}; greedy text " \
            + ("the same" if all(g["same"] for g in step["greedy"].values()) else "DIFFERS")
        if step["rc"] != 0:
            step["error"] = json.dumps({"errors": step["errors"], "greedy": step["greedy"]})[:2000]
        run.add(step)


# Our speed.


def model(run, name):
    """The random model in a format; None if it could not be made."""
    checkpoint, path = run.work / run.args.preset, run.work / f"{run.args.preset}-{name}.gguf"
    if not (checkpoint / "model.safetensors").exists():
        run.command("make the model", [HERE / "bin/param-train", "--preset", run.args.preset, "--init-only", "--out", checkpoint], 60)
    if not path.exists():
        quant = [] if name == "default" else ["--quant", name]
        run.command(f"convert {name}", [HERE / "bin/param-convert", checkpoint / "model.safetensors", path, *quant], 60)
    return path if path.exists() else None


def bench(run):
    for name in run.args.formats.split(","):
        path = model(run, name)
        if path is None:
            continue
        before = run.card()
        command = [HERE / "bin/param-bench", "-m", path, "-p", 512, "--prompts", "1,8", "-n", 128, "-b", run.args.batches, "-r", 5, "-o", "json", *run.device()]
        step, stdout = run.command(f"bench {name}", command, 45, save=False)
        step["clocks"] = {"before": before, "after": run.card()}
        try:
            step["rows"] = json.loads(stdout)
        except ValueError:
            # Rows are written one by one: those that came before the end.
            rows = []
            for line in stdout.splitlines():
                try:
                    rows.append(json.loads(line.strip().rstrip(",")))
                except ValueError:
                    pass
            step["rows"] = [row for row in rows if isinstance(row, dict)]
        for row in step["rows"]:
            row.setdefault("engine", "PARAM")
            row["weights"] = name
        step["note"] = f"{len(step['rows'])} rows"
        run.add(step)


def agree(run):
    """Logits of the measured models on the GPU beside the CPU's."""
    import numpy as np

    rng = random.Random(0)
    for name in run.args.formats.split(","):
        path = run.work / f"{run.args.preset}-{name}.gguf"
        if not path.exists() or run.left() < 20:
            continue
        tokens = [rng.randrange(1000) for _ in range(48)]
        step, start = {"name": f"agree {name}", "rc": 0}, time.monotonic()
        try:
            cuda, cpu = (logits_of(run, path, tokens, run.work / "logits.safetensors", device, 30) for device in ("cuda", "cpu"))
            off = np.linalg.norm(cuda - cpu, axis=1) / np.linalg.norm(cpu, axis=1)
            step["median error"], step["max error"] = float(np.median(off)), float(off.max())
            step["same choice"] = float((cuda.argmax(1) == cpu.argmax(1)).mean())
            step["note"] = f"off by {step['median error']:.1e} (median), {step['max error']:.1e} (worst of {len(off)}), the same choice in {step['same choice']:.0%}"
            step["rc"] = 0 if np.isfinite(off).all() else 1
        except Exception:
            step["rc"], step["error"] = 1, traceback.format_exc()[-3000:]
        step["seconds"] = round(time.monotonic() - start, 2)
        run.add(step)


def with_cublaslt(run):
    """The environment in which cuBLASLt is found: under a name without version, which it may not have where PyTorch keeps it."""
    folders = [Path(path) / "nvidia" for path in sys.path] + [Path("/usr/local/cuda/lib64")]
    found = sorted(str(path) for folder in folders for path in folder.glob("**/libcublasLt.so.1?"))
    if not found:
        return None
    link = Path(run.work) / "cublaslt" / "libcublasLt.so"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(found[-1])
    return {"LD_LIBRARY_PATH": ":".join([str(link.parent), str(Path(found[-1]).parent), os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(":")}


def training(run):
    """Training steps, by AdamW as PyTorch's where not said otherwise."""
    for name in run.args.training.split(","):
        given = name.split(":")
        preset, dtype, batch, optimizer, matmul = given + ["adamw", "mma"][len(given) - 3:]
        matmul, *more = matmul.split("+")
        before = run.card()
        command = [HERE / "bin/param-train", "--benchmark", run.args.training_steps, "--preset", preset, "--dtype", dtype, "--batch-size", batch,
                   "--optimizer", optimizer, "--matmul", matmul, *run.device()]
        command += ["--non-deterministic"] if "atomics" in more else []
        environment = with_cublaslt(run) if "cublaslt" in more else None
        command += [] if environment else ["--no-cublaslt"]
        step, stdout = run.command(f"train {name}", command, 60, env=environment, save=False)
        step["clocks"] = {"before": before, "after": run.card()}
        try:
            row = json.loads(stdout)
            step["rows"] = [{**row, "test": f"train {row['batch']}x{row['context']}", "optimizer": optimizer}]
            step["note"] = f"{row['tok/s']:.0f} tok/s, MFU {row['mfu']:.1%}, loss {row['loss']:.3f}"
        except Exception as e:
            if step["rc"] == 0:
                step["rc"], step["error"] = None, f"its row: {e!r}: {stdout[-1000:]}"
        run.add(step)


# Where time goes, and what is wrong.

METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
}


def profile(run):
    """Kernels of a prefill of 512 tokens, and of four tokens after a short prompt: launches, their time, their traffic with memory."""
    for name in run.args.formats.split(",")[:2]:
        path = model(run, name)
        if path is None:
            continue
        for what, n_prompt, n_gen in (("prefill", 512, 1), ("decode", 8, 4)):
            tokens = ",".join(str(random.Random(i).randrange(1000)) for i in range(n_prompt))
            # Clocks stay as they are found.
            command = ["ncu", "--clock-control", "none", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS),
                       HERE / "bin/param-run", "-m", path, "--tokens", tokens, "-n", n_gen, "--temp", 0, "--ignore-eos", "--print-tokens",
                       *run.device()]
            step, stdout = run.command(f"profile {what} {name}", command, 90, save=False)
            lines = stdout.splitlines()
            first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
            kernels, launches = {}, set()
            for row in csv.DictReader(lines[first:]):
                kernel = kernels.setdefault(row["Kernel Name"].split("(")[0], {"launches": 0})
                if row["ID"] not in launches:
                    launches.add(row["ID"])
                    kernel["launches"] += 1
                    kernel["grid"], kernel["block"] = row.get("Grid Size"), row.get("Block Size")
                key = METRICS.get(row["Metric Name"], row["Metric Name"])
                value = float((row["Metric Value"] or "nan").replace(",", ""))
                kernel[key] = max(kernel.get(key, 0), value) if key in ("registers", "occupancy %") else kernel.get(key, 0) + value
            step["kernels"] = kernels
            step["note"] = f"{len(launches)} launches of {len(kernels)} kernels, {sum(k.get('ns', 0) for k in kernels.values()) / 1e3:.0f} us"
            run.add(step)
            for kernel, of in sorted(kernels.items(), key=lambda item: -item[1].get("ns", 0))[:12]:
                ns, n_byte = of.get("ns", 0), of.get("read", 0) + of.get("written", 0)
                print(f"    {kernel:<36} {of['launches']:>5} x {ns / 1e3 / of['launches']:>9.2f} us {n_byte / max(ns, 1):>8.0f} GB/s "
                      f"{of.get('registers', 0):>5.0f} registers, {of.get('occupancy %', 0):.0f}% of warps", flush=True)


def sanitize(run):
    """Golden cases and the crate's own tests under compute-sanitizer."""
    commands = []
    for line in (HERE / "tests.txt").read_text().splitlines():
        if line.startswith("param-cuda-"):
            commands.append((line.strip(), [HERE / "tests" / line.split()[0], *line.split()[1:], "--test-threads=1"]))
    for case in sorted(path for path in (HERE / "golden").iterdir() if (path / "model.safetensors").exists()):
        gguf = run.work / f"golden-{case.name}.gguf"
        if not gguf.exists():
            run.command(f"golden {case.name}: convert", [HERE / "bin/param-convert", case, gguf, "--quant", "f32"], 30)
        commands.append((f"golden {case.name}", [HERE / "bin/param-run", "-m", gguf, "--tokens", "5,6,7,8,9,10,11,12", "-n", 8, "--temp", 0,
                                                 "--ignore-eos", "--print-tokens", *run.device()]))
    for tool in ("memcheck", "racecheck"):
        for name, command in commands:
            run.command(f"{tool} {name}", ["compute-sanitizer", "--tool", tool, "--error-exitcode", 9, *command], 90, {"PARAM_GPU": "1"})


# PyTorch.


def peers(run):
    limits = {name: PEERS[name] for name in run.args.peers.split(",")}
    torch_steps(run, "peer", "bench_cuda.py", limits, ["--preset", HERE / f"presets/{run.args.preset}.toml"])


def training_peers(run):
    limits = {name: WAYS[name.split(":")[2]] for name in run.args.training_peers.split(",")}
    torch_steps(run, "training peer", "bench_training_cuda.py", limits, ["--presets", HERE / "presets"])


def noted(rows):
    errors = [f"{row['test']} {row['error']}" for row in rows if "error" in row]
    return ", ".join([f"{len(rows) - len(errors)} rows", *errors])


def torch_steps(run, kind, script, limits, flags):
    """Steps in one process, since importing PyTorch takes seconds; another for the rest when one does not come back."""
    args, rows_path, errors = run.args, run.work / "peers.jsonl", run.work / "peers.stderr"
    left = list(limits)
    flags = [*map(str, flags), *(["--device", "cpu", "-r", "1"] if args.device == "cpu" else [])]
    while left and run.left() > 10:
        n_known = 0
        rows_path.write_text("")
        command = [sys.executable, script, *left, "--out", str(rows_path), *flags]
        before, start = run.card(), time.monotonic()
        with open(errors, "w") as stderr:
            process = subprocess.Popen(command, cwd=HERE / "torch", stdout=stderr, stderr=stderr, start_new_session=True)
        failure = None
        deadline = time.monotonic() + min(limits[left[0]] + 30, run.left())  # PyTorch's start is in the first one's limit
        while left:
            is_over = process.poll() is not None
            results = [json.loads(line) for line in rows_path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            for result in results[n_known:]:
                n_known += 1
                left.remove(result["step"])
                step = {"name": f"{kind} {result['step']}", "command": told(command), "rc": 1 if "error" in result else 0,
                        "note": noted(result["rows"]), "clocks": {"before": before, "after": run.card()}, **result}
                before, start = step["clocks"]["after"], time.monotonic()
                run.add(step)
                if left:
                    deadline = time.monotonic() + min(limits[left[0]], run.left())
            if not left:
                break
            if is_over:
                failure = {"rc": process.returncode}
            elif time.monotonic() > deadline:
                failure = {"rc": None, "timed_out": round(time.monotonic() - start, 1)}
            if failure:
                # A process that ends after recording a step leaves the next ones to another; one that ends within a step has failed it.
                if not (is_over and n_known and process.returncode == 3):
                    run.add({"name": f"{kind} {left[0]}", "command": told(command), **failure, "stderr": errors.read_text()[-3000:],
                             "seconds": round(time.monotonic() - start, 1)})
                    left.pop(0)
                break
            time.sleep(0.2)
        try:
            process.wait(timeout=0.1 if failure else 20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for name in left:
        run.add({"name": f"{kind} {name}", "rc": None, "skipped": "no time left"})


# The end.


def training_table(rows):
    """Tokens/s, the share of the card's peak that the operations a token needs are, and ours over PyTorch's best of the run."""
    if not rows:
        return
    ours, best = {}, {}  # by model and type
    for row in rows:
        key, is_ours = (row["preset"], row["dtype"]), row["engine"] == "PARAM"
        if is_ours:
            ours.setdefault((*key, row["context"]), row)
        elif "error" not in row:
            best[key] = max(best.get(key, 0), row["tok/s"])
    print(f"\n| {'model':<10} | {'engine':<38} | {'dtype':<5} | {'batch':<9} | {'tok/s':>13} | {'min':>10} | {'max':>10} | {'MFU':>6} | {'of PyTorch':>10} |")
    print("|" + "|".join("-" * (n + 2) for n in (10, 38, 5, 9, 13, 10, 10, 6, 10)) + "|")
    order = list(dict.fromkeys(row["preset"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["preset"]), row["engine"] != "PARAM", -row.get("tok/s", 0))):
        is_ours, rate = row["engine"] == "PARAM", row.get("tok/s")
        # What a token needs is the same for all; what one-hot products take beyond it counts for nothing.
        like = row if is_ours else ours.get((row["preset"], row["dtype"], row["context"]))
        mfu = f"{rate * like['operations_per_token'] / like['peak']:.1%}" if rate and like else ""
        peer = best.get((row["preset"], row["dtype"])) if is_ours else None
        ratio = f"{rate / peer:.2f} x" if peer else ""
        engine = row["engine"] + "".join(f", {row[key]}" for key, usual in (("optimizer", "adamw"), ("matmul", "mma")) if (row.get(key) or usual) != usual)
        engine += ", cuBLASLt" if row.get("cublaslt") else ""
        engine += ", any order" if row.get("deterministic") is False else ""
        shown = rate if rate else row["error"].split(":")[0]
        print(f"| {row['preset']:<10} | {engine:<38} | {row['dtype']:<5} | {row['test'].removeprefix('train '):<9} | {shown:>13} "
              f"| {row.get('min', ''):>10} | {row.get('max', ''):>10} | {mfu:>6} | {ratio:>10} |")
    if "param-124m" in order:
        print(f"llm.c's own figure for models of param-124m's kind, in bf16 on an H100: MFU {LLM_C}")


def table(run):
    rows = [row for step in run.report["steps"] for row in step.get("rows", [])]
    trained, rows = ([row for row in rows if row.get("test", "").startswith("train ") == is_trained] for is_trained in (True, False))
    ceilings = [row for row in rows if "tok/s" not in row]
    rates = sorted((row for row in rows if "tok/s" in row), key=lambda row: (row.get("n_gen", 0) == 0, row.get("sequences", 1), row.get("depth", 0)))
    card = run.report["card"]
    print(f"\n{card.get('name', '?')}, driver {card.get('driver_version', '?')}, built at {(run.report['built'] or {}).get('revision', '?')}")
    for row in ceilings:
        print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in ("rows", "weights", "engine")))
    if rates:
        print(f"\n| {'test':<16} | {'engine':<44} | {'weights':<8} | {'tok/s':>10} | {'min':>10} | {'max':>10} |")
        print(f"|{'-' * 18}|{'-' * 46}|{'-' * 10}|{'-' * 12}|{'-' * 12}|{'-' * 12}|")
    for row in rates:
        engine = row.get("engine", "") + (f", {row['dispatch']}" if "dispatch" in row and row["dispatch"] != "capacity" else "")
        print(f"| {row['test']:<16} | {engine:<44} | {row.get('weights', ''):<8} | {row['tok/s']:>10} | {row.get('min', ''):>10} | {row.get('max', ''):>10} |")
    training_table(trained)
    bad = [step["name"] for step in run.report["steps"] if step.get("rc") != 0]
    print(f"\n{len(run.report['steps'])} steps in {run.report['seconds']} s; " + (f"NOT OK: {', '.join(bad)}" if bad else "all ok"))
    print(run.path)
    return 1 if bad else 0


def main():
    args = arguments()
    run = Run(args)
    print(json.dumps({"card": run.report["card"], "versions": run.report["versions"]}, indent=1), flush=True)
    if "tests" in args.groups:
        if not args.only_tests:
            run.guarded("first run", lambda: first_run(run))
        run.guarded("test binaries", lambda: test_binaries(run))
        if not args.only_tests:
            run.guarded("golden", lambda: golden(run))
    if "bench" in args.groups:
        run.guarded("bench", lambda: bench(run))
        run.guarded("agree", lambda: agree(run))
    if "training" in args.groups:
        run.guarded("training", lambda: training(run))
    if "profile" in args.groups:
        run.guarded("profile", lambda: profile(run))
    if "sanitize" in args.groups:
        run.guarded("sanitize", lambda: sanitize(run))
    if "peers" in args.groups:
        run.guarded("peers", lambda: peers(run))
    if "training-peers" in args.groups:
        run.guarded("training peers", lambda: training_peers(run))
    run.save()
    sys.exit(table(run))


if __name__ == "__main__":
    main()
