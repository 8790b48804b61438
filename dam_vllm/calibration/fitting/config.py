"""Settings of the fit."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# How far the predictions of the loss trust probes of whole layers over those of single heads.
TRUSTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROOFS_A_CURVE = 3  # choices measured at most for an error; for a density one is enough


class FitConfig(BaseModel):
    """How heads' modes and budgets are fitted.

    Attributes:
        target_error: largest context-aware loss: mean KL of the next token in nats, of the kind of
            text that loses most; or None.
        target_density: largest density of a prompt of the longest length, or None.
        target_kv_memory: largest share of KV heads that keep all their pages while serving, as
            dynamic and dense ones do; or None. Pages of static heads are freed (`kv_free`).
        page: tokens a page, as served.
        lengths: tokens of the texts with a question.
        questions: texts of each retrieval task and length.
        plain: plain held-out texts, of the longest length or as long as they are.
        check: every n-th text is left out of the fit and used for the check at the end.
        tiles: static tiles of context that are measured in each text.
        taus: thresholds of the true mask that are tried for static heads.
        mus: shares of a pattern's cells that are tried for static heads.
        ranks: channels that score a token, or None for an eighth, a quarter, a half and all of a
            head's.
        scoring_cost: time that scoring takes a token and channel over that of attention; measured
            on CPU by `dam-vllm bench scoring`.
        seed: of questions and tiles.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_error: float | None = Field(default=None, gt=0, lt=1)
    target_density: float | None = Field(default=None, gt=0, le=1)
    target_kv_memory: float | None = Field(default=None, ge=0, lt=1)
    page: int = Field(default=32, ge=16, multiple_of=16)
    lengths: list[int] = Field(default=[2048, 4096, 8192], min_length=1)
    questions: int = Field(default=2, ge=1)
    plain: int = Field(default=4, ge=1)
    check: int = Field(default=4, ge=2)
    tiles: int = Field(default=8, ge=1)
    taus: list[float] = Field(default=[0.05, 0.1, 0.2, 0.3], min_length=1)
    mus: list[float] = Field(default=[0.6, 0.8], min_length=1)
    ranks: list[int] | None = None
    scoring_cost: float = Field(default=2.4, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_error is None) == (self.target_density is None):
            raise ValueError(
                f"target_error is {self.target_error} and target_density is "
                f"{self.target_density}: exactly one of them must be given"
            )
        return self

    @property
    def proofs(self) -> int:
        """Choices that are measured at most."""
        return len(TRUSTS) * (1 if self.target_error is None else PROOFS_A_CURVE)
