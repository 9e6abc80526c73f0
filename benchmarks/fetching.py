"""Can it be learned which evidence to fetch? Annotation by gain, SFT, and thought-level RL.

    python benchmarks/fetching.py RUN --save        RUN has a complete `evidence` stage

Every validation user may ask one question of the memory, or none. Annotation labels a user with
the question that raises the target's log-probability most over the direct answer (none, where no
question raises it). A small network over what the state says and what the first rows look like
learns to choose: by cross-entropy on the labels (SFT), by the policy gradient whose advantage is
the gain in log-probability or in ndcg@10 over the direct answer (RL; with so few questions the
expectation is summed, not sampled), or by SFT and then RL. It is judged on users that it was not
trained on (four folds), against the best question for all, a random one, and the oracle that knows
each user's gain. Test users are not looked at.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from streamctl.data import Examples, load_data
from streamctl.decode.evidence import EvidenceSettings, EvidenceThinker, Question
from streamctl.decode.questions import VIEWS
from streamctl.evaluation.compare import bootstrap_mean
from streamctl.evaluation.evaluate import sample_users
from streamctl.evaluation.metrics import gains
from streamctl.runs import RunDir, provenance
from streamctl.training.evidence import load_thinker

RESULTS = Path(__file__).parent / "results"
NONE = "none"
FOLDS, EPOCHS, BATCH = 4, 15, 128
TOP = 5  # best log-probabilities that the network sees

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Annotated:
    """What each question would do for each user.

    Attributes:
        names: of the Q questions, none first.
        log_prob, ndcg: (U, Q) of the target.
        seen: (U, F) what the network may know before the answer.
    """

    names: list[str]
    log_prob: torch.Tensor
    ndcg: torch.Tensor
    seen: torch.Tensor


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    """(B, 1) nats of each row's shares."""
    shares = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    return -torch.xlogy(shares, shares).sum(1, keepdim=True)


@torch.no_grad()
def annotate(thinker: EvidenceThinker, examples: Examples, batch: int = 512) -> Annotated:
    """Ask every question for every user."""
    names = [name for name, view in VIEWS.items() if not view.found]
    repeat = thinker.settings.repeat
    askers = [
        EvidenceThinker(
            thinker.ranker, thinker.memory, EvidenceSettings((Question(name),), repeat),
            thinker.look_alikes,
        )
        for name in names
    ]  # fmt: skip
    log_probs, ranks, seen = [], [], []
    for start in range(0, len(examples), batch):
        part = examples.subset(np.arange(start, min(start + batch, len(examples))))
        history = torch.from_numpy(part.histories(np.arange(len(part))))
        target = torch.from_numpy(part.targets)[:, None]
        state = thinker.ranker.states(history)
        traces = [asker.think(state, history, part.users) for asker in askers]
        scores = [askers[0].log_scores(history, traces[0].first(0))]
        scores += [
            asker.log_scores(history, trace) for asker, trace in zip(askers, traces, strict=True)
        ]
        own = [row.gather(1, target) for row in scores]
        log_probs.append(torch.cat([row.log_softmax(1).gather(1, target) for row in scores], 1))
        ranks.append(torch.stack([(s > o).sum(1) for s, o in zip(scores, own, strict=True)], 1))
        direct = scores[0].log_softmax(1)
        clues = [state, direct.topk(TOP).values, _entropy(direct.exp())]
        clues.append(torch.from_numpy(part.lengths.astype(np.float32)).log()[:, None])
        for asker, trace in zip(askers, traces, strict=True):
            weights, evidence = trace.look_ups[0].weights, asker.evidence(trace.look_ups[0])
            clues += [weights.amax(1, keepdim=True), weights.sum(1, keepdim=True)]
            clues += [evidence.amax(1, keepdim=True), _entropy(evidence)]
            clues.append((direct.exp() * evidence).sum(1, keepdim=True).log1p())
        seen.append(torch.cat(clues, 1))
    ndcg = torch.from_numpy(gains(torch.cat(ranks).numpy(), 10)).float()
    x = torch.cat(seen)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return Annotated([NONE, *names], torch.cat(log_probs), ndcg, x)


def sft(logits: torch.Tensor, log_prob: torch.Tensor, ndcg: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, log_prob.argmax(1))


def rl_log_prob(logits: torch.Tensor, log_prob: torch.Tensor, ndcg: torch.Tensor) -> torch.Tensor:
    return -(logits.softmax(1) * (log_prob - log_prob[:, :1])).sum(1).mean()


def rl_ndcg(logits: torch.Tensor, log_prob: torch.Tensor, ndcg: torch.Tensor) -> torch.Tensor:
    return -20 * (logits.softmax(1) * (ndcg - ndcg[:, :1])).sum(1).mean()


WAYS: dict[str, tuple[Loss, ...]] = {
    "SFT on the labels": (sft,),
    "RL, gain in log-probability": (rl_log_prob,),
    "RL, gain in ndcg@10": (rl_ndcg,),
    "SFT, then RL by ndcg@10": (sft, rl_ndcg),
}


def choices(found: Annotated, losses: tuple[Loss, ...], seed: int) -> torch.Tensor:
    """(U,) the question chosen for each user by a network that was trained without the user."""
    torch.manual_seed(seed)
    users, width = found.seen.shape
    folds = torch.randperm(users).chunk(FOLDS)
    chosen = torch.empty(users, dtype=torch.int64)
    for number, held_out in enumerate(folds):
        others = torch.cat([fold for place, fold in enumerate(folds) if place != number])
        net = nn.Sequential(
            nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, len(found.names))
        )
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for loss in losses:
            for _ in range(EPOCHS):
                for rows in others[torch.randperm(len(others))].split(BATCH):
                    value = loss(net(found.seen[rows]), found.log_prob[rows], found.ndcg[rows])
                    optimiser.zero_grad()
                    value.backward()
                    optimiser.step()
        net.eval()
        with torch.no_grad():
            chosen[held_out] = net(found.seen[held_out]).argmax(1)
    return chosen


def measure(found: Annotated, seed: int) -> list[dict[str, object]]:
    """A row a way of choosing, with the paired interval less the best question for all."""
    best = int(found.ndcg.mean(0).argmax())
    fixed = found.ndcg[:, best].numpy()
    picks = {f"{name} for all": torch.full((len(fixed),), n) for n, name in enumerate(found.names)}
    draws = torch.Generator().manual_seed(seed)
    asked = torch.randint(1, len(found.names), (len(fixed),), generator=draws)
    picks["a random question"] = asked
    picks |= {name: choices(found, losses, seed) for name, losses in WAYS.items()}
    picks["oracle, by log-probability"] = found.log_prob.argmax(1)
    picks["oracle, by ndcg@10"] = found.ndcg.argmax(1)
    rows = []
    for name, chosen in picks.items():
        gained = found.ndcg.gather(1, chosen[:, None])[:, 0].numpy()
        interval = bootstrap_mean(gained - fixed)
        share = (torch.bincount(chosen, minlength=len(found.names)) / len(chosen)).tolist()
        rows.append({
            "choice": name, "ndcg@10": float(gained.mean()),
            "less_best": [interval.low, interval.high],
            "asked": dict(zip(found.names, share, strict=True)),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=10_000, help="at most so many")
    parser.add_argument("--name", help="of the receipt; default: the run's folder")
    parser.add_argument("--save", action="store_true", help="write results/fetching-NAME.json")
    options = parser.parse_args()
    began = time.monotonic()
    run = RunDir(options.run)
    thinker = load_thinker(run, torch.device("cpu"))
    valid = sample_users(load_data(run)[1].valid, options.users, options.seed)
    rows = measure(annotate(thinker, valid), options.seed)
    result = {"name": "fetching", "data_hash": run.stage("data").hash, "split": "valid"}
    result |= {"users": len(valid), "seed": options.seed, "rows": rows}
    result |= {"wall_s": round(time.monotonic() - began, 1), **provenance()}
    text = json.dumps(result, indent=1) + "\n"
    if options.save:
        name = options.name or options.run.resolve().name
        (RESULTS / f"fetching-{name}.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
