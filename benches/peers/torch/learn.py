"""Learns real text in PyTorch on the CPU, as long or as far as asked, and prints a JSON line for every evaluation.

Two recipes: `nanogpt` is nanoGPT's small run of characters (AdamW, 1e-3 falling by a cosine to a tenth over 2,000 steps after 100 of
warmup, windows drawn at random); `reference` the reference implementation's (reference/MODEL.md of the design: one document a
row in file order, 5e-5 falling in a line, no decay, its capacity rule). Seconds count training only: evaluations, which run without
noise, dropout or dropped tokens, stand outside, and so does what torch.compile takes before the first step.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import Config, Param


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=["nanogpt", "reference"], required=True)
    parser.add_argument("--preset", type=Path, metavar="FILE", help="the model's hyperparameters, .toml or .json")
    parser.add_argument("--init-from", type=Path, metavar="DIR", help="a checkpoint to begin with instead of fresh weights")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="a text, by character, or JSON lines with --tokenizer")
    parser.add_argument("--eval-data", type=Path, metavar="FILE", help="what to evaluate on [default: the last tenth of --data]")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json for JSON lines")
    parser.add_argument("--batch", type=int, help="rows per batch [default: 12 of nanogpt, 8 of reference]")
    parser.add_argument("--context", type=int, help="tokens of a row [default: the preset's]")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the schedule, after which it ends")
    parser.add_argument("--schedule-steps", type=int, help="where the schedule ends, if the run ends before")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of training, after which it ends")
    parser.add_argument("--until", type=float, default=-math.inf, metavar="LOSS", help="validation loss at which it ends")
    parser.add_argument("--eval-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--no-noise", action="store_true", help="router noise and dropout off")
    parser.add_argument("--losses", action="store_true", help="print the loss of every step as well")
    parser.add_argument("--dispatch", choices=["capacity", "gather"], default="capacity")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("-t", "--threads", type=int, default=2)
    args = parser.parse_args()
    if (args.preset is None) == (args.init_from is None):
        parser.error("expected --preset or --init-from")
    args.batch = args.batch or {"nanogpt": 12, "reference": 8}[args.recipe]
    return args


class Characters:
    """One text, by character: windows of it at random, and its end in rows that do not overlap."""

    def __init__(self, args):
        text = args.data.read_text()
        alphabet = sorted(set(text))
        self.n_vocab = len(alphabet)
        place = {character: i for i, character in enumerate(alphabet)}
        ids = torch.tensor([place[character] for character in text])
        cut = len(ids) * 9 // 10
        self.train, self.held_out = ids[:cut], ids[cut:]
        self.n_byte = len(text[cut + 1 :].encode())

    def batch(self, _, n_row, n_col):
        starts = torch.randint(len(self.train) - n_col, (n_row,))
        rows = torch.stack([self.train[start : start + n_col + 1] for start in starts.tolist()])
        return rows[:, :-1], rows[:, 1:], None

    def evaluation(self, n_row, n_col):
        n = (len(self.held_out) - 1) // n_col
        inputs, targets = self.held_out[: n * n_col].view(n, n_col), self.held_out[1 : n * n_col + 1].view(n, n_col)
        for first in range(0, n, n_row):
            yield inputs[first : first + n_row], targets[first : first + n_row], None


class Documents:
    """JSON lines, one document a row: begin-of-text if there is one, the tokens, end-of-text as padding that is no target."""

    def __init__(self, args):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(args.tokenizer))
        self.n_vocab = tokenizer.get_vocab_size()
        self.bos = next((i for name in ("<|begin_of_text|>", "<s>") if (i := tokenizer.token_to_id(name)) is not None), None)
        self.pad = next(i for name in ("<|end_of_text|>", "<|endoftext|>", "</s>") if (i := tokenizer.token_to_id(name)) is not None)
        self.train = self.read(tokenizer, args.data)
        self.held_out = self.read(tokenizer, args.eval_data)
        self.n_byte = sum(len(text.encode()) for text in self.texts(args.eval_data))

    @staticmethod
    def texts(path):
        return [text for line in path.read_text().splitlines() if line.strip() and (text := json.loads(line)["text"])]

    def read(self, tokenizer, path):
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in self.texts(path)]

    def rows(self, documents, n_col):
        bos = [] if self.bos is None else [self.bos]
        rows = [(bos + ids)[:n_col] for ids in documents]
        ids = torch.tensor([row + [self.pad] * (n_col - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (n_col - len(row)) for row in rows])
        targets = F.pad(ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (ids[:, 1:] == self.pad), -100), (0, 1), value=-100)
        return ids, targets, mask

    def batch(self, step, n_row, n_col):
        return self.rows([self.train[i % len(self.train)] for i in range(step * n_row, (step + 1) * n_row)], n_col)

    def evaluation(self, n_row, n_col):
        """Every token of every document once, as a model would be run: documents joined with end-of-text, cut into rows."""
        ids = torch.tensor([self.pad] + [token for document in self.held_out for token in document + [self.pad]])
        n = -(-(len(ids) - 1) // n_col)
        inputs = F.pad(ids[:-1], (0, n * n_col - len(ids) + 1), value=self.pad).view(n, n_col)
        targets = F.pad(ids[1:], (0, n * n_col - len(ids) + 1), value=-100).view(n, n_col)
        for first in range(0, n, n_row):
            yield inputs[first : first + n_row], targets[first : first + n_row], None


def total_loss(model, batch, noise):
    ids, targets, mask = batch
    logits = model(ids, mask, noise=noise)
    loss = F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=-100)
    return loss + model.router_loss()


@torch.no_grad()
def evaluate(model, data, n_row, n_col):
    model.eval()
    dispatch, model.dispatch = model.dispatch, "gather"
    total, n_target = 0.0, 0
    for ids, targets, mask in data.evaluation(n_row, n_col):
        logits = model(ids, mask)
        total += F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum").item()
        n_target += (targets != -100).sum().item()
    model.dispatch = dispatch
    model.train()
    return {"eval_loss": total / n_target, "bits_per_byte": total / math.log(2) / data.n_byte}


def learning_rate(args, step):
    total = args.schedule_steps or args.steps
    if args.recipe == "reference":
        return 5e-5 * max(0.0, 1 - step / total)
    if step < 100:
        return 1e-3 * (step + 1) / 101
    along = min(1.0, (step - 100) / (total - 100))
    return 1e-4 + 0.5 * (1 + math.cos(math.pi * along)) * 9e-4


def optimizer_of(args, model):
    if args.recipe == "reference":
        return torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = Documents(args) if args.tokenizer else Characters(args)
    if args.init_from:
        model = Param.load(args.init_from, args.dispatch)
    else:
        config = Config.load(args.preset)
        config.vocab_size = data.n_vocab
        config.context_length = args.context or config.context_length
        if args.no_noise:
            config.use_noisy_top_k, config.dropout_rate = False, 0.0
        model = Param(config, args.dispatch)
        model.initialize()
    model.train()
    n_row, n_col = args.batch, args.context or model.config.context_length
    noise = torch.randn if model.config.use_noisy_top_k and not args.no_noise else None
    optimizer = optimizer_of(args, model)
    loss_of = torch.compile(total_loss) if args.compile else total_loss
    if args.compile:
        loss_of(model, data.batch(0, n_row, n_col), noise).backward()
        optimizer.zero_grad()
    seconds = 0.0
    for step in range(args.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = loss_of(model, data.batch(step, n_row, n_col), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        seconds += time.perf_counter() - start
        if args.losses:
            print(json.dumps({"step": step + 1, "loss": loss}), flush=True)
        is_last = step + 1 == args.steps or seconds >= args.seconds
        if is_last or (step + 1) % args.eval_every == 0:
            result = evaluate(model, data, n_row, n_col)
            row = {"step": step + 1, "seconds": round(seconds, 2), "n_token": (step + 1) * n_row * n_col, **result}
            print(json.dumps(row), flush=True)
            if is_last or result["eval_loss"] <= args.until:
                break


if __name__ == "__main__":
    main()
