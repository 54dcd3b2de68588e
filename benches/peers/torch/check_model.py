"""Holds model.py against the numbers the reference computed (tests/golden): logits, dispatch, cache, losses, gradients.

Bounds: logits 1e-4, losses 1e-5 and norms of gradients 1e-4 relative; all in f32, as the project's own tests have them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from model import Param

GOLDEN = Path(__file__).resolve().parents[3] / "tests" / "golden"


def expect(what, got, want, bound):
    error = np.abs(np.asarray(got) - np.asarray(want)).max()
    print(f"{what}: off by {error:.1e}, bound {bound:.0e}")
    if not error <= bound:
        sys.exit(f"error: {what} is off by more than {bound:.0e}")


@torch.no_grad()
def inference(case):
    arrays = np.load(case / "eval.npz")
    for name in [name for name in arrays if name.endswith(".input_ids")]:
        test = name.removesuffix(".input_ids")
        ids = torch.from_numpy(arrays[name]).long().view(1, -1)
        model = Param.load(case)
        expect(f"{test} logits", model(ids)[0], arrays[f"{test}.logits"], 1e-4)
        caches = model.new_caches()
        cut = ids.shape[1] // 2
        parts = [ids[:, :cut], *ids[:, cut:-1].split(1, dim=1), ids[:, -1:]] if cut else [ids]
        cached = torch.cat([model(part, caches=caches) for part in parts if part.numel()], dim=1)
        expect(f"{test} logits with a cache", cached[0], arrays[f"{test}.logits"], 1e-4)
        if f"{test}.logits_capacity2" in arrays:
            model.dispatch = "capacity"
            expect(f"{test} logits with the capacity rule", model(ids)[0], arrays[f"{test}.logits_capacity2"], 1e-4)


def training(case):
    for name, variant in json.loads((case / "train.json").read_text()).items():
        if "steps" not in variant:
            continue
        arrays = {key: torch.from_numpy(value) for key, value in np.load(case / f"train_{name}_io.npz").items()}
        for dispatch in ["capacity"] if name.startswith("cap") else ["gather", "grouped"]:
            model = Param.load(case, dispatch).train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
            given = iter([value.flatten(0, 1) for key, value in arrays.items() if key.startswith("noise")])
            noise = (lambda *shape: next(given)) if name == "noise" else None
            loss = model.loss(arrays["input_ids"].long(), arrays.get("attention_mask"), noise)
            loss.backward()
            want = variant["steps"][0]["total"]
            expect(f"{name} loss, {dispatch}, relative", loss.item() / want, 1.0, 1e-5)
            grads = {key: parameter.grad for key, parameter in model.named_parameters()}
            norms = {key: grad.norm().item() for key, grad in grads.items() if grad is not None}
            wants = {key: value["grad"]["l2"] for key, value in variant["tensors"].items()}
            errors = [norms[key] / wants[key] for key in norms if wants.get(key, 0) > 1e-6]
            expect(f"{name} norms of {len(errors)} gradients, {dispatch}, relative", errors, 1.0, 1e-4)


for case in sorted(path for path in GOLDEN.iterdir() if path.is_dir() and (path / "eval.npz").exists()):
    print(f"case {case.name}")
    inference(case)
    training(case)
