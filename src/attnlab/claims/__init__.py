"""The claims ledger: what papers say that can be measured here in minutes, and what was measured."""

from __future__ import annotations

from attnlab.claims.judge import VERDICTS, judge
from attnlab.claims.outcomes import Outcome, outcomes
from attnlab.claims.quantity import Quantity
from attnlab.claims.run import run_claims
from attnlab.claims.spec import Claim, Condition, claim, claims

__all__ = ["VERDICTS", "Claim", "Condition", "Outcome", "Quantity", "claim", "claims", "judge", "outcomes", "run_claims"]
