"""`streamctl rerank`: a learned ranker behind any method."""

from __future__ import annotations

from streamctl.commands.options import Job, option, print_json, print_table, stage_command


@stage_command()
def command(
    job: Job,
    methods: str | None = option(
        "Comma-separated: one ranker over the candidates of all these, compared with the first. "
        "Default: one each."
    ),
) -> None:
    """Re-rank the candidates of a method and of the hops with gradient-boosted trees.

    Its features are what the method and every hop say of a candidate, its text, its popularity,
    and whether the user had it. It is trained on validation users and judged by folds, so that no
    user judges what they trained. `eval` shows the method with and without it; it may win only if
    the 95% interval of its gain is above zero.

    Reads: data, tokenizer and the methods' stages. Writes: RUN/rerank/NAME (or NAME+NAME).
    Example: `streamctl rerank --run runs/mine --methods stream_sft,transitions`.
    Next: `streamctl eval --run RUN`.
    """
    from streamctl.config import RerankConfig
    from streamctl.evaluation.rerank import rerank

    stages = job.make(rerank, job.settings(RerankConfig, methods=methods))
    reports = {stage.name: stage.json("report.json") for stage in stages}
    if job.json:
        print_json(reports)
        return
    rows = [
        [
            name.removeprefix("rerank/"), report["ndcg@10"]["before"], report["ndcg@10"]["after"],
            f"{report['gain']['low']:+.4f} {report['gain']['high']:+.4f}",
            "yes" if report["kept"] else "no",
        ]
        for name, report in reports.items()
    ]  # fmt: skip
    columns = ["", "ndcg@10", "re-ranked", "95% of the gain", "kept"]
    print_table("Validation users by folds, seen items masked", columns, rows)
