"""Reads GGUF files with gguf-py and compares every tensor with what ours dequantizes it to.

usage: read_gguf.py METADATA.json FOLDER...
Each FOLDER holds model.gguf and expected.safetensors.
The latter has each tensor by its GGUF name, f32. METADATA has the keys that must be there with their values.
"""

import json
import os
import sys

import numpy as np
from gguf import GGUFReader, quants
from safetensors.numpy import load_file

# Both compute scale times integer in f32; they may multiply and add in another order, which costs a few roundings.
BOUND = 1e-6


def check(folder, metadata):
    reader = GGUFReader(os.path.join(folder, "model.gguf"))
    expected = load_file(os.path.join(folder, "expected.safetensors"))
    found = {tensor.name for tensor in reader.tensors}
    assert found == expected.keys(), f"tensors differ: {sorted(found ^ expected.keys())}"
    worst, skipped = 0.0, set()
    for tensor in reader.tensors:
        want = expected[tensor.name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert shape == want.shape, f"{tensor.name}: {shape} instead of {want.shape}"
        try:
            got = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            skipped.add(tensor.tensor_type.name)
            continue
        got = got.reshape(shape).astype(np.float32)
        off = np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny)
        assert off <= BOUND, f"{tensor.name} ({tensor.tensor_type.name}): off by {off} of its largest weight"
        worst = max(worst, float(off))
    for key, want in metadata.items():
        field = reader.get_field(key)
        assert field is not None, f"no metadata key {key}"
        got = field.contents()
        same = abs(got - want) < 1e-12 if isinstance(want, float) else got == want
        assert same, f"{key}: {got!r} instead of {want!r}"
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    print(f"{os.path.basename(folder)}: {len(found)} tensors of types {', '.join(types)}: off by at most {worst:.1e} of a tensor's largest weight")
    for name in sorted(skipped):
        print(f"skipped: gguf-py cannot dequantize {name}")


with open(sys.argv[1]) as file:
    metadata = json.load(file)
for folder in sys.argv[2:]:
    check(folder, metadata)
