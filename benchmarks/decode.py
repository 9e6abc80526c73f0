"""Speed of decoding beside transformers' generate on the same weights.

    python benchmarks/decode.py --json [--save] [--only beam] [--clock cpu] [--device cuda]

Each contender gets the same users, trie, beam and number of tokens. transformers runs with the
per-beam `prefix_allowed_tokens_fn` and with a vectorised logits processor, in fp32 and under bf16
autocast; the ratio is to the fastest of them. Before the clock starts, fp32 items and scores are
compared; contenders that differ get no figures. A row `.../vs-plain` compares the way that is
chosen here (STREAMCTL_DECODE=auto) with the same algorithm in plain torch. `thought/...` is an
answer after 16 pieces of evidence beside one without a thought: `cost` is how many times as long it
takes, gathering and weighing among it.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import peers
import torch

from streamctl.decode import recommend, rollout
from streamctl.decode.evidence import EvidenceRecommender
from streamctl.model import Policy
from streamctl.tokenizer import PrefixTrie, Tokens

BEAM = 20
USERS, GROUP = 64, 16
PARITY = 1e-4  # of log-probabilities


class TrieProcessor:
    """The vectorised constraint: each step closes all tokens but the children of the beams' nodes.

    Beams are walked from the root again each step (they are reordered between calls), all at once.
    """

    def __init__(self, trie: PrefixTrie, vocabulary: int, device: str):
        rows = np.repeat(np.arange(trie.n_nodes), np.diff(trie.child_start))
        self.keys = torch.from_numpy(rows * vocabulary + trie.child_token).to(device)
        self.child = torch.from_numpy(trie.child_node).to(device)
        self.start = torch.from_numpy(trie.child_start).to(device)
        self.token = torch.from_numpy(trie.child_token).to(device)
        self.vocabulary = vocabulary

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        node = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for column in tokens[:, 1:].T:
            wanted = node * self.vocabulary + column
            edge = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            node = torch.where(self.keys[edge] == wanted, self.child[edge], 0)
        first, count = self.start[node], self.start[node + 1] - self.start[node]
        beam = torch.repeat_interleave(torch.arange(len(node), device=node.device), count)
        place = torch.arange(len(beam), device=node.device)
        place = place - torch.repeat_interleave(count.cumsum(0) - count, count)
        closed = torch.full_like(scores, -torch.inf)
        at = beam, self.token[first[beam] + place]
        closed[at] = scores[at]
        return closed


def generate(oracle, policy: Policy, history: torch.Tensor, **options) -> torch.Tensor:
    return oracle.generate(
        **peers.encoder_inputs(policy, history),
        decoder_start_token_id=Tokens.BOS,
        max_new_tokens=peers.LEVELS,
        min_new_tokens=peers.LEVELS,
        return_dict_in_generate=True,
        **options,
    )


class Beams:
    """Beam search by both, over one catalogue."""

    def __init__(self, device: str):
        self.policy = peers.paper_policy(device)
        self.trie = peers.catalogue(self.policy)
        self.oracle = peers.transformers_model(self.policy)
        self.processor = TrieProcessor(self.trie, self.policy.tokens.size, device)
        self.device = device

    def allowed(self, _row: int, tokens: torch.Tensor) -> list[int]:
        node = self.trie.walk(tokens[1:].tolist())
        edges = slice(self.trie.child_start[node], self.trie.child_start[node + 1])
        return self.trie.child_token[edges].tolist()

    def theirs(self, history: torch.Tensor, **constraint):
        return generate(
            self.oracle, self.policy, history, num_beams=BEAM, num_return_sequences=BEAM,
            length_penalty=0.0, do_sample=False, output_scores=True, **constraint,
        )  # fmt: skip

    def by_function(self, history: torch.Tensor):
        return self.theirs(history, prefix_allowed_tokens_fn=self.allowed)

    def by_processor(self, history: torch.Tensor):
        return self.theirs(history, logits_processor=[self.processor])

    def ours(self, history: torch.Tensor, **more):
        return recommend(self.policy, self.trie, history, BEAM, beam=BEAM, **more)

    def check(self, history: torch.Tensor) -> None:
        """fp32: the same items with the same scores, for the vectorised processor and for us.

        An item may be missing from one list if it is no better than the list's last.
        """
        answer, ours = self.by_processor(history), self.ours(history, exact=True)
        scores = answer.sequences_scores.view(len(history), 1, BEAM)
        codes = answer.sequences[:, 1:].view(len(history), 1, BEAM, -1)
        same = (codes == self.policy.item_tokens[ours.items][:, :, None]).all(-1)
        theirs = torch.where(same, scores, -torch.inf).amax(-1)
        theirs = torch.where(same.any(-1), theirs, scores[..., -1])
        off = (theirs - ours.scores).abs().max()
        if not off <= PARITY:
            raise SystemExit(f"items or scores differ from transformers' by {off:.1e}: no figures")

    def contenders(self, history: torch.Tensor, function: bool) -> dict:
        def half(call):
            def run():
                with peers.bf16(self.device):
                    return call(history)

            return run

        found = {
            "streamctl": lambda: self.ours(history),
            "streamctl, fp32": lambda: self.ours(history, exact=True),
            "generate, vectorised processor": lambda: self.by_processor(history),
            "generate, vectorised processor, bf16": half(self.by_processor),
        }
        if function:
            found["generate, prefix_allowed_tokens_fn"] = lambda: self.by_function(history)
        return found


def by_ways(call) -> dict:
    """The chosen way beside each of the two, for a row `.../vs-plain`."""

    def forced(name: str):
        def run():
            with peers.way(name):
                return call()

        return run

    return {"streamctl": call, "plain torch": forced("plain"), "packed": forced("packed")}


def ways_row(case: str, call, work: float, unit: str, repeats: int, now) -> dict:
    """The ratio is to plain torch; what the packed passes reach is beside it."""
    seconds = peers.take_turns(by_ways(call), repeats, now)
    packed = seconds.pop("packed")
    return peers.row(case, seconds, work, unit, packed=work / packed)


def thought_rows(device: str, repeats: int, only: str, now) -> list[dict]:
    """An answer at l = 16 beside l = 0, for one user and for 32."""
    split, evidence = peers.shop()
    policy = peers.paper_policy(device, "items", softmax="catalogue", thoughts="evidence")
    thinker = EvidenceRecommender(policy, peers.catalogue(policy), evidence, beam=BEAM)
    found = []
    for count in (1, 32):
        case, users = f"thought/b{count}", np.arange(count)
        if not case.startswith(only):
            continue
        history = torch.from_numpy(split.test.histories(users))
        turns = {
            name: partial(thinker.recommend, history, 10, users=users, think=length)
            for name, length in (("streamctl", 16), ("no thought", 0))
        }
        seconds = peers.take_turns(turns, repeats, now)
        more = {"cost": seconds["streamctl"] / seconds["no thought"], "goal": 1.5}
        found.append(peers.row(case, seconds, count, "users/s", **more))
    return found


@torch.no_grad()
def rows(device: str = "cpu", repeats: int = 5, only: str = "", clock: str = "wall") -> list[dict]:
    """The receipt's rows; also called by benchmarks/gpu.py."""
    now = peers.clock(clock, device)
    beams = Beams(device)
    policy, found = beams.policy, []
    lengths, _ = peers.real_lengths()
    random = np.random.default_rng(1)
    real = peers.histories(random.choice(lengths, 32)).to(device)
    full = peers.histories(np.full(32, peers.LONGEST)).to(device)
    beams.check(real[:4])
    cases = {"beam/b32": full, "beam/b32-real-lengths": real, "beam/b1": full[:1]}
    for name, history in cases.items():
        if name.startswith(only):
            contenders = beams.contenders(history, function=name != "beam/b32-real-lengths")
            seconds = peers.take_turns(contenders, repeats, now)
            exact = len(history) / seconds.pop("streamctl, fp32")
            memory = peers.peak_mb(contenders)
            line = peers.row(name, seconds, len(history), "users/s", peak_mb=memory)
            found.append(line | {"ours_fp32": exact})
        if device == "cpu" and f"{name}/vs-plain".startswith(only):
            line = f"{name}/vs-plain", partial(beams.ours, history), len(history), "users/s"
            found.append(ways_row(*line, repeats, now))
    history = peers.histories(random.choice(lengths, USERS)).to(device)

    def ours():
        return rollout(policy, history, group=GROUP, think=0, seed=1)

    def sampled(half: bool):
        def run():
            options = {"do_sample": True, "num_return_sequences": GROUP, "top_k": 0}
            if half:
                with peers.bf16(device):
                    return generate(beams.oracle, policy, history, **options)
            return generate(beams.oracle, policy, history, **options)

        return run

    tokens = USERS * GROUP * peers.LEVELS
    if "rollout/b64g16".startswith(only):
        turns = {
            "streamctl": ours,
            "generate, sampling": sampled(False),
            "generate, sampling, bf16": sampled(True),
        }
        seconds = peers.take_turns(turns, repeats, now)
        memory = peers.peak_mb(turns)
        found.append(peers.row("rollout/b64g16", seconds, tokens, "tokens/s", peak_mb=memory))
    if device == "cpu" and "rollout/b64g16/vs-plain".startswith(only):
        line = "rollout/b64g16/vs-plain", ours, tokens, "tokens/s"
        found.append(ways_row(*line, repeats, now))
    return found + thought_rows(device, repeats, only, now)


if __name__ == "__main__":
    peers.run("decode", __doc__.splitlines()[0], rows)
