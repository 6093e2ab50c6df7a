"""What the claims of an experiment say together."""

from typing import Any

import pandas as pd

from rc_probe.results.words import many, number


def judge_claims(claims: pd.DataFrame) -> dict[str, Any]:
    """`sentence`, `reasons` (a sentence for each claim that does not hold) and the counts: claims, hold, unknown."""
    holds = claims["holds"]
    known, held = int(holds.notna().sum()), int(holds.fillna(False).astype(bool).sum())
    seeds = int(claims["seeds"].max()) if len(claims) else 0
    sentence = f"{held} of {many(known, 'claims')} {'holds' if held == 1 else 'hold'} with {'every one of ' if seeds > 1 else ''}{many(seeds, 'seeds')}."
    reasons = [said(row) for row in claims.to_dict("records") if row["holds"] is False]
    if left := len(claims) - known:
        reasons.append(f"These sizes do not decide {many(left, 'further claims')}.")
    return {
        "sentence": sentence,
        "reasons": reasons,
        "claims": len(claims),
        "hold": held,
        "unknown": len(claims) - known,
    }


def said(row: Any) -> str:
    """A claim that does not hold, with its numbers."""
    span = f" ({number(row['low'], 3)} to {number(row['high'], 3)})" if row["seeds"] > 1 else ""
    return f"Does not hold: {row['claim']}. Expected {row['expected']}, measured {number(row['measured'], 3)}{span}."
