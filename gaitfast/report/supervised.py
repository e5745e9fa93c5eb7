"""What the page shows of a transfer run: its curves, headline figures and sections."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gaitfast.report import markup
from gaitfast.report.figures import CURVES as PRETRAINING
from gaitfast.report.figures import Curve, smoothed
from gaitfast.report.headline import Headline, ends
from gaitfast.report.run import Run

CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "loss",
            "Loss in training",
            partial(smoothed, key="loss", title="Loss in training", unit="weighted sum of the two losses"),
            "The loss at the logged steps; of many (pale) also the running mean (dark).",
            "metrics.jsonl: loss",
        ),
        replace(
            PRETRAINING["learning_rate"],
            caption="Of the head and, unless it is frozen, of the backbone; they drop at the milestones.",
            source="metrics.jsonl: lr_head, lr_backbone",
        ),
        Curve(
            "triplet",
            "Triplet loss",
            partial(smoothed, key="triplet", title="Triplet loss", unit="mean over the active triplets"),
            "The batch-all triplet loss. It is a mean over the triplets above zero, of which fewer and harder ones"
            " remain, so it need not fall.",
            "metrics.jsonl: triplet",
        ),
        Curve(
            "active",
            "Active triplets",
            partial(smoothed, key="active", title="Active triplets", unit="share with a loss above zero, %", scale=100),
            "Share of the global batch's triplets that the margin is not yet kept in: what is left to learn from.",
            "metrics.jsonl: active",
        ),
        Curve(
            "identity",
            "Identity loss",
            partial(smoothed, key="identity", title="Identity loss", unit="smoothed cross-entropy"),
            "Cross-entropy over the identities of the training set, before its weight.",
            "metrics.jsonl: identity",
        ),
        Curve(
            "accuracy",
            "Identities named in training",
            partial(smoothed, key="accuracy", title="Identities named in training", unit="% of parts", scale=100),
            "Share of the parts of the batch's clips whose largest logit is the right one.",
            "metrics.jsonl: accuracy",
        ),
        replace(
            PRETRAINING["rank1"],
            caption="Share of probe walks whose nearest gallery walk is of the same person (the paper's Fig. 4).",
            source="evaluations.jsonl: rank1",
        ),
        replace(PRETRAINING["throughput"], caption="Clips through the whole step per second, all ranks together."),
        PRETRAINING["data_wait"],
    )
}


def tiles(run: Run, result: Headline) -> str:
    """The headline figures."""
    rank1, loss = result.rank1, result.loss
    points = "" if rank1.difference is None else f"{rank1.difference:+.1f} points"
    return (
        '<div class="headline">\n'
        + markup.tile("Rank-1", rank1, "unseen people", points)
        + markup.tile("mAP", ends("percent", run.evaluations.series("mAP")), "unseen people")
        + markup.tile("Active triplets", ends("share", run.metrics.series("active")), "share above zero")
        + markup.tile("Training loss", loss, "first and last logged step")
        + "</div>\n"
    )


def training(curves: dict[str, str]) -> str:
    """The section of what is optimised. `curves`: name -> markup."""
    parts = [markup.pair(curves["loss"], curves["learning_rate"]), markup.pair(curves["triplet"], curves["active"])]
    return markup.section("Training", *parts, markup.pair(curves["identity"], curves["accuracy"]))
