"""Charts of the embedding space: its spectrum, its path through training, a map."""

from collections.abc import Callable

import altair as alt
import numpy as np
import torch

from nearfar.app.errors import InputError
from nearfar.app.report.chart import RAW, ROWS, SAME, Plot, short, signal, spec
from nearfar.app.report.study import Study
from nearfar.app.report.words import percent
from nearfar.app.train.record import Array
from nearfar.tabulate import Table

COLOURED = 10  # identities with a colour in the map; more colours look alike
ELSEWHERE = "others"
Projection = Callable[[Array], Array]


def spectrum(study: Study) -> Plot:
    values = study.outcome.singular_values.astype(float)
    energy = values**2 / max(float((values**2).sum()), 1e-30)
    rows = [{"rank": i + 1, "share": short(share)} for i, share in enumerate(energy)]
    n, d = len(study.outcome.identity), study.outcome.embeddings.shape[1]
    half, most = (int(np.searchsorted(energy.cumsum(), share) + 1) for share in (0.5, 0.9))
    bars = alt.Chart(ROWS).mark_area(color=SAME, opacity=0.75, interpolate="step")
    return Plot(
        "spectrum",
        "Spectrum of the embeddings",
        f"The share of the energy of {n:,} test embeddings in each of their {len(values)} "
        f"principal directions (d = {d}). If the spectrum falls to zero after a few directions, "
        "the embedding has collapsed: the other dimensions carry no information.",
        f"A falling curve. {half} directions hold half of the energy, {most} hold nine tenths.",
        Table(
            ("directions", "share of the energy"),
            [
                (str(k), percent(float(energy[:k].sum())))
                for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)
                if k <= len(energy)
            ],
        ),
        spec(
            bars.encode(
                x=alt.X("rank:Q", title="direction", axis=alt.Axis(tickMinStep=1)),
                y=alt.Y("share:Q", title="share of the energy", axis=alt.Axis(format="~%")),
            ),
            rows,
            height=230,
        ),
    )


def path(study: Study) -> Plot:
    course = study.course
    rows = [
        {
            "moment": i,
            "step": int(step),
            "uniformity": short(course.uniformity[i]),
            "alignment": short(course.alignment[i]),
        }
        for i, step in enumerate(course.step)
    ]
    line = alt.Chart(ROWS).encode(
        x=alt.X(
            "uniformity:Q",
            title="uniformity  (lower: spread evenly)",
            scale=alt.Scale(zero=False, nice=False, padding=14),
        ),
        y=alt.Y(
            "alignment:Q",
            title="alignment  (lower: same pairs close)",
            scale=alt.Scale(zero=False, nice=False, padding=14),
        ),
    )
    here = line.transform_filter("datum.moment == moment")
    chart = alt.layer(
        line.mark_line(color=SAME, opacity=0.6).encode(order="moment:Q"),
        line.mark_circle(color=SAME, size=45, opacity=1),
        here.mark_point(filled=True, size=130, color="currentColor", opacity=1),
        here.transform_calculate(words="'step ' + datum.step")
        .mark_text(color="currentColor", dy=-14, fontSize=12)
        .encode(text="words:N"),
    )
    return Plot(
        "path",
        "Alignment and uniformity",
        "Good embeddings bring same pairs close (low alignment) and still use the whole space "
        "(low uniformity). A network that collapses moves down and to the right, where all "
        "embeddings are close together. The dark dot is the step of the slider.",
        f"A path from alignment {course.alignment[0]:.3f}, uniformity {course.uniformity[0]:.3f} "
        f"to {course.alignment[-1]:.3f} and {course.uniformity[-1]:.3f}.",
        Table(
            ("step", "alignment", "uniformity", "effective rank"),
            [
                (str(step), f"{a:.4f}", f"{u:.4f}", f"{rank:.1f}")
                for step, a, u, rank in zip(
                    course.step,
                    course.alignment,
                    course.uniformity,
                    course.effective_rank,
                    strict=True,
                )
            ],
        ),
        spec(chart.add_params(signal("moment", len(rows) - 1)), rows, height=230),
    )


def principal(embeddings: Array) -> Array:
    """(n, 2) coordinates along the two directions of largest variance, with a fixed sign."""
    x = torch.from_numpy(embeddings).double()
    if x.shape[1] == 1:
        x = torch.nn.functional.pad(x, (0, 1))  # there is only one direction
    left, values, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    sign = right[:2].gather(1, right[:2].abs().argmax(1, keepdim=True)).sign()[:, 0]
    found: Array = (left[:, :2] * values[:2] * sign).numpy()
    return found


def umap(embeddings: Array) -> Array:
    """(n, 2) coordinates that keep neighbours together; large distances mean little.

    Raises:
        InputError: the extra `umap` is not installed.

    Source: McInnes et al., "UMAP", 2018, by the library `umap-learn`.
    """
    try:
        from umap import UMAP
    except ModuleNotFoundError:
        raise InputError("--umap needs umap-learn: pip install 'nearfar[umap]'") from None
    found: Array = UMAP(n_components=2, metric="cosine", random_state=0, n_jobs=1).fit_transform(
        embeddings.astype(np.float32)
    )
    return found


def embedding_map(study: Study, project: Projection = principal) -> Plot:
    outcome = study.outcome
    at = project(outcome.embeddings.astype(np.float32))
    identity = outcome.identity[outcome.mapped]
    found, counts = np.unique(identity, return_counts=True)
    largest = found[np.argsort(-counts, kind="stable")][:COLOURED]
    names = {int(i): f"{outcome.identities[i]}" for i in np.sort(largest)}
    rows = [
        {
            "x": short(x),
            "y": short(y),
            "identity": names.get(int(i), ELSEWHERE),
            "name": str(outcome.names[item]),
        }
        for (x, y), i, item in zip(at, identity, outcome.mapped, strict=True)
    ]
    others = len(found) > len(names)
    way = (
        "their two directions of largest variance (PCA)"
        if project is principal
        else "two dimensions that keep neighbours together (UMAP)"
    )
    return Plot(
        "map",
        "A map of the test embeddings",
        f"{len(rows):,} embeddings of {len(found)} identities, reduced to {way}. The items of one "
        "identity should lie together. Two dimensions show little of "
        f"{study.outcome.embeddings.shape[1]}: what overlaps here may be far apart in the others."
        + (f" The {len(names)} identities with the most items are coloured." if others else ""),
        f"A cloud of {len(rows)} points, coloured by identity.",
        _centres(at, identity, names),
        spec(_cloud(list(dict.fromkeys(names.values())), others), rows, height=420),
    )


def _cloud(coloured: list[str], others: bool) -> alt.LayerChart | alt.FacetChart:
    """A point for each item; the coloured identities lie on top of the others."""
    # Of the categorical scheme "tableau10", without its grey.
    colours = "#4c78a8 #f58518 #54a24b #e45756 #72b7b2 #b79a20 #b279a2 #ff9da6 #9d755d #3969ac"
    colour = alt.Color(
        "identity:N",
        scale=alt.Scale(domain=coloured, range=colours.split()[: len(coloured)]),
        legend=alt.Legend(columns=5, symbolLimit=COLOURED),
    )
    cloud = alt.Chart(ROWS).encode(
        x=alt.X("x:Q", axis=None, scale=alt.Scale(zero=False)),
        y=alt.Y("y:Q", axis=None, scale=alt.Scale(zero=False)),
        tooltip=alt.Tooltip("name:N"),
    )
    chosen = cloud.transform_filter(f"datum.identity != '{ELSEWHERE}'")
    layers = [chosen.mark_circle(size=60, opacity=0.9).encode(color=colour)]
    if others:
        rest = cloud.transform_filter(f"datum.identity == '{ELSEWHERE}'")
        layers.insert(0, rest.mark_circle(size=18, opacity=0.25, color=RAW))
    return alt.layer(*layers)


def _centres(at: Array, identity: Array, names: dict[int, str]) -> Table:
    """The number of items of each named identity, and the mean of their coordinates."""
    return Table(
        ("identity", "items", "x", "y"),
        [
            (
                name,
                str(int((identity == i).sum())),
                f"{at[identity == i, 0].mean():.3f}",
                f"{at[identity == i, 1].mean():.3f}",
            )
            for i, name in names.items()
        ],
    )
