"""Puts a form through prox24's command line, beside plain transformers."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from cluster.command_line import run
from tests.support.jobs import tensors, write_text
from tests.support.published_forms.folder import make_folder
from tests.support.published_forms.form import PRUNED, Form

TOLERANCE = 1e-4
SEQLEN, SEQUENCES = 32, 5  # five in batches of two: the last is shorter
_ROUTER = re.compile(r"router|\.gate\.(wg\.)?(weight|bias)$|shared_expert_gate|e_score_correction")
_WORK = ["--executor", "local", "--threads", "1", "--batch-size", "2", "--dtype", "float32"]


@dataclass(frozen=True)
class Outcome:
    """What became of a form.

    refusal: the message where `plan` or `prune` refused it. wrong: what is not as it has to be.
    dense, pruned: relative difference of the loss from plain transformers'.
    """

    refusal: str | None = None
    wrong: str | None = None
    dense: float | None = None
    pruned: float | None = None

    def is_as(self, form: Form) -> bool:
        """Whether this is the outcome that the form's data states."""
        if self.wrong is not None:
            return False
        if form.outcome == PRUNED:
            return self.refusal is None
        return self.refusal is not None and form.outcome in self.refusal

    def __str__(self) -> str:
        if self.wrong is not None:
            return f"WRONG: {self.wrong}"
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        return f"pruned; loss differs by {self.dense:.1e} dense, {self.pruned:.1e} pruned"


def try_form(form: Form, folder: Path) -> Outcome:
    """Makes the form below `folder`, then plans, prunes, verifies and evaluates it."""
    source = make_folder(form, folder / "source")
    output, text = folder / "output", write_text(folder / "text.txt")
    job = [*_WORK, "--method", "wanda", "--nsamples", "4", "--seqlen", str(SEQLEN)]
    planned, _, refusal = quietly(["plan", str(source), *job])
    job += ["--dataset", str(text), "--no-report"]
    pruned, _, said = quietly(["prune", str(source), str(output), *job])
    if pruned == 2:
        if planned not in (0, 2):
            return Outcome(wrong=f"plan: exit {planned}: {refusal}")
        if output.exists():
            return Outcome(wrong="refused, and left an output")
        # Without weights it is a plan of the config.json alone.
        if planned == 0 and any(source.glob("*.safetensors")):
            return Outcome(wrong=f"plan accepts what prune refuses: {last_line(said)}")
        return Outcome(refusal=last_line(said))
    if pruned != 0:
        return Outcome(wrong=f"prune: exit {pruned}: {last_line(said)}")
    if planned != 0:
        return Outcome(wrong=f"plan: exit {planned}, but prune works: {last_line(refusal)}")
    verified, _, said = quietly(["verify", str(output), "--source", str(source)])
    if verified != 0:
        return Outcome(wrong=f"verify: exit {verified}: {last_line(said)}")
    if changed := changed_routers(source, output):
        return Outcome(wrong=f"routers are not as they were: {', '.join(changed)}")
    texts = ["--dataset", str(text), "--json"]
    texts += ["--nsamples", str(SEQUENCES), "--seqlen", str(SEQLEN)]
    differences = []
    for model in (source, output):
        rc, out, said = quietly(["eval", str(model), *_WORK, *texts])
        if rc != 0:
            return Outcome(wrong=f"eval of the {model.name}: exit {rc}: {last_line(said)}")
        expected = plain_loss(form, model, text)
        differences.append(abs(math.log(json.loads(out)["perplexity"]) / expected - 1))
    wrong = None
    if not all(difference <= TOLERANCE for difference in differences):  # NaN is above too
        wrong = "loss differs from transformers' by {:.1e} dense, {:.1e} pruned".format(
            *differences
        )
    return Outcome(wrong=wrong, dense=differences[0], pruned=differences[1])


def changed_routers(source: Path, output: Path) -> list[str]:
    """Names of the tensors that choose experts and are not the same in both folders."""
    before = dict(tensors(source))
    return [
        name
        for name, tensor in tensors(output)
        if _ROUTER.search(name) and not torch.equal(tensor, before[name].to(tensor.dtype))
    ]


@torch.no_grad()
def plain_loss(form: Form, model: Path, text: Path) -> float:
    """transformers' loss of the folder as it loads it, on the sequences that `eval` takes."""
    factory = getattr(transformers, form.factory)
    # What is stored in few bits is dequantized to bfloat16, here as there.
    few_bits = "quantization_config" in json.loads((model / "config.json").read_text())
    dtype = torch.bfloat16 if few_bits else torch.float32
    loaded, info = factory.from_pretrained(model, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{form.name} is not as published: it lacks {', '.join(missing[:4])}")
    loaded.float().eval()
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(), add_special_tokens=False)
    ids = torch.tensor(tokens["input_ids"])[: SEQUENCES * SEQLEN].reshape(SEQUENCES, SEQLEN)
    losses = []
    for row in ids:
        logits = loaded(input_ids=row[None], use_cache=False).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:]))
    return float(torch.stack(losses).mean())


def quietly(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a prox24 command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
