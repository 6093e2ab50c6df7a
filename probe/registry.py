"""The metrics' names, units, ranges and sources: one registry for CLI, tables, report and docs.

No torch here: `rc-probe --help` reads it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from rc_probe.hooks.errors import RcProbeError

DONG = "Dong, Cordonnier, Loukas 2021 (arXiv 2103.03404)"
WU = "Wu, Ajorlou, Wang, Jegelka, Jadbabaie 2024 (arXiv 2405.18781)"
SHI = "Shi, Gao, Xu et al. 2022 (arXiv 2202.08625), section 'Does over-smoothing exist in BERT?'"
SUN = "Sun, Chen, Kolter, Liu 2024 (arXiv 2402.17762)"

WHOLE = "transformer"  # the model as it is
PAPER = ("SAN", "SAN+MLP", "SAN+skip", WHOLE)  # the four variants of Dong et al. 2021, figure 2


MASSIVE = 5  # a token is massive if its norm is over so many times the median of its sample's real tokens


@dataclass(frozen=True)
class Metric:
    """What a column of numbers means.

    low, high: the range that the metric cannot leave (None: unbounded)
    better: the direction in which tokens are further apart; None where the number alone does not say
    cost: "cheap" (a few passes over the stream), "svd" (and what takes as long), "solver"; what is not cheap runs on fewer samples
    default: measured when the user asks for nothing
    may_be_nan: it has no value for some streams, such as equal tokens
    """

    name: str
    title: str
    formula: str
    unit: Literal["ratio", "cosine", "count", "norm", "nats"]
    low: float | None
    high: float | None
    better: Literal["higher", "lower"] | None
    source: str
    cost: Literal["cheap", "svd", "solver"] = "cheap"
    default: bool = True
    may_be_nan: bool = False


_ALL = (
    Metric("residual", "Relative residual",
           "‖res X‖₁,∞ / ‖X‖₁,∞, ‖·‖₁,∞ = √(‖·‖₁ ‖·‖∞), res X = X − 1 mean(X)ᵀ",
           "ratio", 0, 2, "higher", f"{DONG}, section 2"),
    Metric("residual_bulk", "Relative residual of the bulk",
           f"the relative residual of the tokens of norm at most {MASSIVE} × the median norm",
           "ratio", 0, 2, "higher", f"{DONG}, section 2; massive tokens: {SUN}"),
    Metric("residual_frobenius", "Relative residual, Frobenius norm", "‖res X‖_F / ‖X‖_F",
           "ratio", 0, 1, "higher", f"{WU}, measure μ(X), divided by ‖X‖_F"),
    Metric("residual_absolute", "Absolute residual", "‖res X‖₁,∞",
           "norm", 0, None, None, f"{DONG}, section 2"),
    Metric("cosine", "Token cosine", "mean over i ≠ j of cos(x_i, x_j)",
           "cosine", -1, 1, "lower", SHI),
    Metric("cosine_bulk", "Token cosine of the bulk", "the token cosine of the bulk, as for its residual",
           "cosine", -1, 1, "lower", SHI),
    Metric("cosine_centred", "Token cosine, centred", "mean over i ≠ j of cos(x_i − mean, x_j − mean)",
           "cosine", -1, 1, None, f"{SHI}, here after subtracting the token mean", may_be_nan=True),
    Metric("norm", "Token norm", "mean over i of ‖x_i‖₂",
           "norm", 0, None, None, "mean Euclidean length of a token of the stream"),
    Metric("massive_share", "Share of massive tokens", f"share of tokens of norm over {MASSIVE} × the median norm",
           "ratio", 0, 0.5, None, SUN),
    Metric("effective_rank", "Effective rank", "exp(−Σ p ln p), p = σ / Σσ",
           "count", 0, None, "higher", "Roy, Vetterli 2007 (EUSIPCO), definition 1", cost="svd"),
    Metric("stable_rank", "Stable rank", "‖X‖_F² / σ₁²",
           "count", 0, None, "higher", "Rudelson, Vershynin 2007 (J. ACM 54), numerical rank", cost="svd"),
    Metric("effective_rank_bulk", "Effective rank of the bulk", "the effective rank of the bulk",
           "count", 0, None, "higher", "Roy, Vetterli 2007 (EUSIPCO), definition 1", cost="svd"),
    Metric("stable_rank_bulk", "Stable rank of the bulk", "the stable rank of the bulk",
           "count", 0, None, "higher", "Rudelson, Vershynin 2007 (J. ACM 54), numerical rank", cost="svd"),
    Metric("residual_frobenius_absolute", "Absolute residual, Frobenius norm", "‖res X‖_F",
           "norm", 0, None, None, f"{WU}, measure μ(X)", default=False),
    Metric("cosine_absolute", "Absolute token cosine", "mean over i ≠ j of |cos(x_i, x_j)|",
           "cosine", 0, 1, "lower", f"{WU}, figure 4", cost="svd", default=False),
    Metric("residual_argmin", "Relative residual, best x", "min over x of ‖X − 1 xᵀ‖₁,∞ / ‖X‖₁,∞, value attained",
           "ratio", 0, 1, "higher", f"{DONG}, section 2",
           cost="solver", default=False),
    Metric("residual_argmin_low", "Relative residual, best x, lower bound",
           "a number that no x can go below in ‖X − 1 xᵀ‖₁,∞ / ‖X‖₁,∞",
           "ratio", 0, 1, "higher", f"{DONG}, section 2; bound by linear duality",
           cost="solver", default=False),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

# Of products P of attention patterns along a path, in the table `chains`; no stream has them.
CHAIN_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("rank_one", "Distance to rank one", "‖P − σ₁ u₁ v₁ᵀ‖₁,∞ / ‖P‖₁,∞",
               "ratio", 0, None, "higher", f"{DONG}, figure of chained attention", cost="svd"),
        Metric("mean_row", "Distance to equal rows", "‖P − 1 mean(P)ᵀ‖₁,∞ / ‖P‖₁,∞",
               "ratio", 0, 2, "higher", f"{DONG}, section 2, the relative residual of P"),
        Metric("dobrushin", "Dobrushin coefficient", "½ max over i, j of Σ_k |P_ik − P_jk|",
               "ratio", 0, 1, "higher", "Dobrushin 1956 (Theory Probab. Appl. 1), section 1.4"),
    )
}  # fmt: skip


REM = "Giorlandino, Goldt 2025 (arXiv 2505.24333)"

# Of one head's attention patterns, in the table `attention`; of a block: the mean over its heads.
ATTENTION_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("entropy", "Entropy", "mean over queries of −Σ a ln a / ln n, n keys that a query may see",
               "ratio", 0, 1, None, "Zhai et al. 2023 (arXiv 2303.06296)"),
        Metric("sink", "Attention to one key", "largest mean attention that one key gets, of the other queries that may see it",
               "ratio", 0, 1, None, "Gu et al. 2024 (arXiv 2410.10781)"),
        Metric("sink_share", "Share with a sink", "share of samples, and of heads, in which one key gets over .3 so",
               "ratio", 0, 1, None, "Gu et al. 2024 (arXiv 2410.10781)"),
        Metric("logit_variance", "Variance of the scores", "mean over queries of the variance of its scores over the keys it may see",
               "norm", 0, None, None, REM),
        Metric("phase", "β / β_c", "√ mean over queries of v / (2 ln n), v that variance; over 1: entropy collapse, below: rank collapse",
               "ratio", 0, None, None, f"{REM}, β_c = √(2 / (1 − p))"),
        Metric("least_weight", "Smallest weight", "min over queries and the keys that they may see of a",
               "ratio", 0, 1, None, f"{WU}, ε"),
        Metric("dobrushin", "Dobrushin coefficient", "½ max over i, j of Σ_k |A_ik − A_jk|",
               "ratio", 0, 1, None, "Dobrushin 1956 (Theory Probab. Appl. 1), section 1.4", cost="svd"),
        Metric("singular_gap", "σ₁ / σ₂", "σ₁ / σ₂ of the pattern, at most 1 / rounding",
               "ratio", 1, None, None, "Saada, Naderi, Tanner 2025, Mind the Gap (PMLR 267)", cost="svd"),
    )
}  # fmt: skip


# Of the paths of one length, in the table `paths`.
PATH_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("norm_share", "Share of the norm", "‖S_k‖_F / (Σ_j ‖S_j‖_F + ‖B‖_F), S_k the part of length k, B of biases",
               "ratio", 0, 1, None, f"{DONG}, theorem 2.1, its terms grouped by length"),
        Metric("projection", "Share of the output", "⟨S_k, Y⟩ / ⟨Y, Y⟩, Y the last hidden state; with biases they sum to 1",
               "ratio", None, None, None, "linear in S_k, so that sampled paths estimate it without bias"),
        Metric("cosine_to_output", "Cosine to the output", "mean over i of cos((S_k)_i, Y_i)",
               "cosine", -1, 1, None, "direction of a part, token by token"),
        Metric("residual_share", "Residual over that of the output", "‖res S_k‖₁,∞ / ‖res Y‖₁,∞; of length 0: what claim 3.1 says that skips keep",
               "ratio", 0, None, None, f"{DONG}, claim 3.1"),
        Metric("agreement", "Agreement with the full model", "share of predictions that stay the same",
               "ratio", 0, 1, "higher", f"{DONG}, section 4.2, against the model instead of labels"),
        Metric("accuracy", "Accuracy", "share of predictions that are right",
               "ratio", 0, 1, "higher", f"{DONG}, section 4.2"),
        Metric("loss", "Loss", "mean of −ln p(right answer), in nats",
               "nats", 0, None, "lower", "cross-entropy of the model's own head"),
        Metric("spearman", "Rank correlation", "Spearman's correlation of cosine and given similarity",
               "ratio", -1, 1, "higher", "Reimers, Gurevych 2019 (arXiv 1908.10084), section 4"),
    )
}  # fmt: skip

GROMOV = "Gromov, Tirumala, Shapourian, Glorioso, Roberts 2024 (arXiv 2403.17887)"
PROXY = "proxy_"  # how names of metrics begin that only stand for what a removal costs

# Of a part that is removed, in the tables `importance` and `drops`, beside those of the model's task.
REMOVAL_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("kl", "KL divergence", "mean of Σ p ln(p / q) over the answers, p of the whole model, q without the part",
               "nats", 0, None, "lower", "Kullback, Leibler 1951 (Ann. Math. Statist. 22)"),
        Metric("embedding_distance", "Distance of embeddings", "mean of 1 − cos(e, e′), e of the whole model",
               "cosine", 0, 2, "lower", "for models whose answers are embeddings, which are no probabilities"),
        Metric("proxy_block_influence", "Block influence", "1 − mean over i of cos(x_i before the block, x_i behind it)",
               "cosine", 0, 2, None, "Men et al. 2024, ShortGPT (arXiv 2403.03853)"),
        Metric("proxy_angular_distance", "Angular distance", "mean over i of arccos(cos(x_i before, x_i behind)) / π",
               "ratio", 0, 1, None, f"{GROMOV}, who take the last token alone"),
        Metric("proxy_branch_norm", "Size of the branch", "mean over i of ‖branch_i‖ / ‖stream_i‖ where they are added",
               "ratio", 0, None, None, "how much the branch adds"),
        Metric("proxy_branch_cosine", "Direction of the branch", "mean over i of cos(branch_i, stream_i) where they are added",
               "cosine", -1, 1, None, "below 0 the branch takes away what the stream holds"),
    )
}  # fmt: skip

AMSEL = "Amsel, Yehudai, Bruna 2024, on the benefits of rank in attention layers (arXiv 2407.16153)"
BHOJANAPALLI = "Bhojanapalli, Yun, Rawat, Reddi, Kumar 2020, low-rank bottleneck (arXiv 2002.07028)"

# Of a head's two circuits, in the table `heads`. M is the form: scores of `qk` are zᵀ M z′, `ov` adds M z to the stream.
HEAD_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("effective_rank", "Effective rank", "exp(−Σ p log p), p = σ / Σ σ, σ the singular values of M",
               "count", 1, None, None, "Roy and Vetterli 2007"),
        Metric("stable_rank", "Stable rank", "Σ σ² / σ₁²", "count", 1, None, None, "Rudelson and Vershynin 2007"),
        Metric("r90", "Rank of 90 % of the energy", "how many singular values hold 90 % of Σ σ²", "count", 1, None, None, "energy of the form"),
        Metric("r99", "Rank of 99 % of the energy", "how many singular values hold 99 % of Σ σ²", "count", 1, None, None, "energy of the form"),
        Metric("share_of_head", "Effective rank over head width", "effective rank / width of the head's queries",
               "ratio", 0, 1, None, "1: the head uses its whole width"),
        Metric("share_of_model", "Effective rank over model width", "effective rank / width of the stream", "ratio", 0, 1, None, AMSEL),
        Metric("symmetric", "Symmetric share", "‖(M + Mᵀ) / 2‖²_F / ‖M‖²_F; the rest is skew", "ratio", 0, 1, None, "of M without biases"),
        Metric("identity", "Nearness to ±I", "cos(M, I) / √(width of the head / width of the stream): 1 and −1 are the most that a head so wide can reach",
               "cosine", -1, 1, None, f"above 0 nearest-like, below 0 farthest-like; {AMSEL}, figures of trained heads"),
        Metric("slow_energy", "Energy in slow pairs", "share of Σ ‖M_pair‖²_F in pairs of rotary features that turn less than once over the longest sample",
               "ratio", 0, 1, None, "rotary positions alone; M is that of equal positions"),
        Metric("logits_r90", "Rank of the scores on this data", "mean over samples of how many singular values hold 90 % of the energy of the row-centred scores q kᵀ of real tokens",
               "count", 0, None, None, BHOJANAPALLI),
        Metric("bottleneck", "Narrower than the context", "1 where the head is narrower than the longest sample has tokens, so that its scores are of lower rank",
               "ratio", 0, 1, None, BHOJANAPALLI),
    )
}  # fmt: skip

# Of embeddings, one of each sample, in the table `embeddings`, beside accuracy and rank correlation of retrieval.
EMBEDDING_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("embedding_cosine", "Cosine of random pairs", "mean over samples i ≠ j of cos(e_i, e_j), e the pooled embedding",
               "cosine", -1, 1, "lower", "Ethayarajh 2019 (arXiv 1909.00512), section 3.2, there of words"),
        Metric("embedding_cosine_far", "Cosine above most random pairs", "the cosine that 95 % of these pairs are below",
               "cosine", -1, 1, "lower", "a quantile of the same pairs"),
        Metric("first_component", "Variance of the first component", "λ₁ / Σ λ, λ the variances of the principal components of e",
               "ratio", 0, 1, "lower", "Mu, Viswanath 2018 (arXiv 1702.01417), section 2"),
        Metric("isoscore", "IsoScore", "((Σ λ)² / Σ λ² − 1) / (D − 1), D the dimension of e",
               "ratio", 0, 1, "higher", "Rudman, Gillman, Rayne, Eickhoff 2022 (arXiv 2108.07344), algorithm 1"),
        Metric("rankme", "RankMe", "exp(−Σ p ln p), p = σ / Σσ, σ the singular values of all e, not centred",
               "count", 0, None, "higher", "Garrido, Balestriero, Najman, LeCun 2023 (arXiv 2210.02885), section 3"),
        *(PATH_METRICS[name] for name in ("accuracy", "spearman")),
    )
}  # fmt: skip

# Of heads with less rank, in the table `truncation`, beside what the model predicts and the residual of the bulk.
TRUNCATION_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("attention_kl", "KL of attention rows", "mean over heads and real queries of Σ p ln(p / q), p the row of the whole model, q that of the truncated head on the same inputs",
               "nats", 0, None, "lower", "of the truncated blocks that were named; what they read may differ where blocks before them are truncated, too"),
        Metric("retrieval", "Same token found", "share of real tokens whose best other token by qᵀPk is that of the whole form qᵀk",
               "ratio", 0, 1, "higher", f"the target of {AMSEL}, in the head's own metric and at equal positions"),
        Metric("nearest", "Nearest token found", "share of real tokens whose best other token by qᵀPk is the nearest one by the cosine of what the projections read",
               "ratio", 0, 1, None, f"the target of {AMSEL}, in one metric for all heads"),
        Metric("smallest_rank", "Smallest rank", "the least measured rank from which on every larger one costs at most --head-tolerance, this head alone",
               "count", 0, None, None, "the width of the head where there is none"),
        Metric("parameters", "Weights of queries and keys", "Σ over heads of 2 · rank · width of the stream; of the whole model those of its query and key projections, without biases",
               "count", 0, None, None, "each head with factors of its own: keys are no longer shared by groups"),
    )
}  # fmt: skip

DAVARI = "Davari, Horoi, Natik et al. 2022 (arXiv 2210.16156), on the few tokens that rule it"
CHANGE = "change_"  # how names of metrics begin that are the second model's number minus the first's


def _change(metric: Metric) -> Metric:
    span = None if metric.low is None or metric.high is None else metric.high - metric.low
    return Metric(
        CHANGE + metric.name, f"{metric.title}, change", f"that of the second model minus that of the first; {metric.formula}",
        metric.unit, None if span is None else -span, span, None, metric.source, metric.cost, may_be_nan=metric.may_be_nan,
    )  # fmt: skip


# Of two models side by side, in the table `differences`. A is the first model, B the second.
DIFFERENCE_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("difference", "Relative difference", "‖X_B − X_A‖_F / ‖X_A‖_F, X the stream of a sample at a layer",
               "ratio", 0, None, "lower", "all real tokens of a sample"),
        Metric("difference_bulk", "Relative difference of the bulk", f"the same over the tokens of norm at most {MASSIVE} × the median norm in A",
               "ratio", 0, None, "lower", f"massive tokens: {SUN}"),
        Metric("cka", "Linear CKA", "‖Ȳᵀ X̄‖²_F / (‖X̄ᵀ X̄‖_F ‖Ȳᵀ Ȳ‖_F), rows all real tokens of all samples, centred",
               "ratio", 0, 1, None, "Kornblith, Norouzi, Lee, Hinton 2019 (arXiv 1905.00414), section 3"),
        Metric("cka_bulk", "Linear CKA of the bulk", "the same over the tokens that are massive in neither model",
               "ratio", 0, 1, None, DAVARI),
        Metric("sensitivity", "Sensitivity", "‖f_B(x_A) − f_A(x_A)‖_F / ‖X_A‖_F: a block or a branch of B on what A's got; X_A is A's stream behind it",
               "ratio", 0, None, "lower", "one part at a time, so that errors do not add up"),
        Metric("sensitivity_bulk", "Sensitivity of the bulk", "the same over the bulk of A's stream",
               "ratio", 0, None, "lower", f"massive tokens: {SUN}"),
        *(PATH_METRICS[name] for name in ("agreement",)),
        *(REMOVAL_METRICS[name] for name in ("kl", "embedding_distance")),
        *(_change(PATH_METRICS[name]) for name in ("loss", "accuracy", "spearman")),
        *(_change(metric) for metric in METRICS.values()),
    )
}  # fmt: skip


def select(names: Iterable[str] | None = None) -> list[str]:
    """Names of the metrics to measure, in display order: the defaults for None, else those asked for.

    `residual_argmin` brings `residual_argmin_low` with it: one run of the solver gives both.
    Raises RcProbeError for a name that is not in the registry.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if metric.default]
    asked = {names} if isinstance(names, str) else set(names if isinstance(names, Iterable) else [names])
    for name in sorted(asked - METRICS.keys(), key=str):
        close = get_close_matches(str(name), METRICS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from {', '.join(METRICS)}."
        raise RcProbeError(f"no metric is called {name!r}", where="metrics", todo=hint)
    if "residual_argmin" in asked:
        asked.add("residual_argmin_low")
    return [name for name in METRICS if name in asked]
