"""Reads a run's event files with TensorBoard and compares all they say with the run's metrics.

usage: read_events.py RUN
"""

import json
import os
import sys

import numpy as np
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator


def expected(run):
    """Step and value of each record, by tag: of scalars, and of texts."""
    moe_blocks = moe_block_numbers(run)
    scalars, texts = {}, {}

    def scalar(tag, step, value):
        if value is not None:
            scalars.setdefault(tag, []).append((step, np.float32(value)))

    with open(os.path.join(run, "metrics.jsonl")) as lines:
        for record in map(json.loads, lines):
            step = record.pop("step")
            if "sample" in record:
                texts.setdefault("sample", []).append((step, record["sample"]))
                continue
            for field, value in record.items():
                if "eval_loss" in record:
                    scalar("eval/" + field.removeprefix("eval_"), step, value)
                elif not isinstance(value, list):
                    scalar(f"train/{field}", step, value)
                else:
                    for block, row in zip(moe_blocks, value):
                        if not isinstance(row, list):
                            scalar(f"{field}/block_{block}", step, row)
                            continue
                        for expert, load in enumerate(row):
                            scalar(f"{field}/block_{block}/expert_{expert}", step, load)
    return scalars, texts


def moe_block_numbers(run):
    with open(os.path.join(run, "last", "config.json")) as file:
        config = json.load(file)
    stride, phase = config["stride"], config.get("moe_phase", 0)
    return [block for block in range(config["num_layers"]) if block % stride == phase]


def main(run):
    folder = os.path.join(run, "tensorboard")
    everything = event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE
    events = event_accumulator.EventAccumulator(folder, size_guidance=everything).Reload()
    # What TensorBoard itself shows. The other one forgets scalars of steps that a resumed run goes through again, but no texts.
    shown = plugin_event_accumulator.EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
    scalars, texts = expected(run)
    tags = events.Tags()
    assert set(tags["scalars"]) == scalars.keys(), f"scalars differ: {sorted(set(tags['scalars']) ^ scalars.keys())}"
    assert set(tags["tensors"]) == texts.keys(), f"texts differ: {tags['tensors']}"
    for tag, want in scalars.items():
        got = [(event.step, np.float32(event.value)) for event in events.Scalars(tag)]
        assert got == want, f"{tag}: {got} instead of {want}"
        assert [event.step for event in shown.Tensors(tag)] == [step for step, _ in want], tag
    for tag, want in texts.items():
        assert shown.SummaryMetadata(tag).plugin_data.plugin_name == "text"
        got = [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown.Tensors(tag)]
        assert [step for step, _ in got] == [step for step, _ in want], f"{tag}: {got} instead of {want}"
        for (_, got_text), (_, text) in zip(got, want):
            assert got_text.startswith("    ") and text.split() == got_text.split(), (got_text, text)
    print(f"{sum(map(len, scalars.values()))} scalars in {len(scalars)} tags, {sum(map(len, texts.values()))} texts")


main(sys.argv[1])
