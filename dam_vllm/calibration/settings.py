"""The settings of a calibration and of its fit; each is told of here, and nowhere else."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.options import PAGE_MULTIPLES

# How far the predictions of the loss trust probes of whole layers over those of single heads.
TRUSTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROOFS_A_CURVE = 3  # choices measured at most for an error; for a density one is enough
# Assignments of anchors beside the free one: none, one a layer, and few anchors of two numbers.
ASSIGNMENTS = 4
TRUSTS_KEPT = 1  # they are measured for as many trusts, the free one's best
# Density of the frontier's other points over that of the one taken.
FRONTIER_STEPS = (0.5, 0.7, 1.2, 1.5, 2.5)


Length = Annotated[int, Field(ge=256)]  # shorter ones hold no question of some tasks
Threshold = Annotated[float, Field(allow_inf_nan=False)]  # amplified attention may be negative
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Platform = Literal["cpu", "cuda"]


class FitConfig(BaseModel):
    """How heads' modes and budgets are fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_error: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The fit takes the lowest density whose loss stays below this: mean KL of the "
        "next token in nats, of the kind of text that loses most; or null.",
    )
    target_density: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The fit takes the least loss with at most this density of a prompt of the "
        "longest length; or null.",
    )
    target_kv_memory: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest share of KV heads that keep all their pages while serving, as dynamic "
        "and dense ones do; or null. Pages of static heads are freed (kv_free).",
    )
    page: int = Field(
        default=32,
        ge=16,
        multiple_of=16,
        description="Tokens a page, as served; a multiple of 32 on cpu.",
    )
    platform: Platform | None = Field(
        default=None,
        description="What serves, cpu or cuda, whose cost of choosing pages counts; null for what "
        "calibrates.",
    )
    lengths: list[Length] = Field(
        default=[2048, 4096, 8192], min_length=1, description="Tokens of the texts with a question."
    )
    questions: int = Field(default=2, ge=1, description="Texts of each retrieval task and length.")
    plain: int = Field(
        default=4,
        ge=1,
        description="Plain held-out texts, of the longest length or as long as they are.",
    )
    check: int = Field(
        default=4,
        ge=2,
        description="Every n-th text is left out of the fit and used for the check at the end.",
    )
    query_blocks: int = Field(
        default=8,
        ge=1,
        description="Static query blocks of context that are measured in each text.",
    )
    taus: list[Threshold] = Field(
        default=[0.05, 0.1, 0.2, 0.3],
        min_length=1,
        description="Thresholds of the true mask that are tried for static heads.",
    )
    mus: list[Share] = Field(
        default=[0.6, 0.8],
        min_length=1,
        description="Shares of a pattern's cells that are tried for static heads.",
    )
    channels: list[Count] | None = Field(
        default=None,
        min_length=1,
        description="Channels that score a token, or null for an eighth, a quarter, a half and "
        "three quarters of a head's.",
    )
    ranks: int = Field(
        default=1,
        ge=1,
        description="Tensor-parallel ranks that the masks are for: heads read what heads of their "
        "own rank chose, since serving refuses others.",
    )
    choosing_cost: float = Field(
        default=1.0,
        ge=0,
        description="What choosing pages costs, over what was measured on the platform: "
        "1 counts it as it is, 0 not at all.",
    )
    seed: int = Field(default=0, ge=0, description="Of questions and query blocks.")

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
        curves = len(TRUSTS) + ASSIGNMENTS * TRUSTS_KEPT
        a_curve = 1 if self.target_error is None else PROOFS_A_CURVE
        return curves * a_curve + len(FRONTIER_STEPS)


AmplificationName = Literal[
    "box-cox", "sqrt", "log", "yeo-johnson", "z-score", "min-max", "average", "sum", "arcsinh"
]


TARGETS = ("target_error", "target_density")
MEMORY_TARGET = "target_kv_memory"


class Amplification(BaseModel):
    """How mean attention is amplified before the threshold (paper, Stage 1 and appendix)."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: AmplificationName = Field(
        default="box-cox", description="The function, see dam_vllm.calibration.static.amplify."
    )
    lambda_: float = Field(
        default=0.5,
        alias="lambda",
        ge=-2,
        le=2,
        description='Exponent of Box-Cox and Yeo-Johnson; "lambda" in YAML.',
    )
    epsilon: float = Field(
        default=1e-8,
        gt=0,
        le=1e-2,
        description="Smallest mean attention that is told apart from none.",
    )


class CalibrationConfig(BaseModel):
    """Settings of a calibration, independent of the model; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pcl: int | None = Field(
        default=None,
        ge=16,
        description="Pattern Capture Length in tokens, or null for the longest that memory, the "
        "model and the texts allow.",
    )
    amplification: Amplification = Field(
        default=Amplification(), description="How mean attention is amplified."
    )
    tau: Threshold = Field(
        default=0.3, description="Threshold of the true mask, on the amplified scale."
    )
    mu: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of a pattern's cells that must be in the true mask for it to be kept.",
    )
    min_support: int | None = Field(
        default=None,
        ge=1,
        description="Cells that a pattern needs to be considered, or null for pcl / 8; beyond the "
        "PCL the same share of the map of pages.",
    )
    reach: int | None = Field(
        default=None,
        ge=32,
        description="Length in tokens up to which columns and diagonals are looked for on maps of "
        "pages, or null for the PCL.",
    )
    map_page: int = Field(default=32, ge=2, description="Tokens a page of these maps.")
    long_texts: int = Field(
        default=16,
        ge=1,
        description="Largest number of windows of reach tokens that they are captured on.",
    )
    texts: int = Field(
        default=256, ge=1, description="Largest number of windows, held-out ones included."
    )
    window: int | None = Field(
        default=None,
        ge=16,
        description="Tokens of a held-out window, or null for the PCL; a longer one measures the "
        "extended mask too.",
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Share of the texts on which coverage is measured instead.",
    )
    batch_size: int = Field(default=1, ge=1, description="Windows a forward pass.")
    seed: int = Field(default=0, ge=0, description="Of the choice and the split of texts.")
    fit: FitConfig | None = Field(
        default=None,
        description="How every KV head's mode is fitted, or null for the paper's static masks.",
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.pcl is not None:
            if self.window is not None and self.window < self.pcl:
                raise ValueError(f"window is {self.window}, must be at least pcl ({self.pcl})")
            if self.min_support is not None and self.min_support > self.pcl:
                raise ValueError(
                    f"min_support is {self.min_support}, must be at most pcl ({self.pcl})"
                )
            if self.reach is not None and self.reach <= self.pcl:
                raise ValueError(f"reach is {self.reach}, must be more than pcl ({self.pcl})")
        if self.reach is not None and self.reach % self.map_page:
            raise ValueError(
                f"reach is {self.reach}, must be a multiple of map_page ({self.map_page})"
            )
        if self.held_out and self.texts < 2:
            raise ValueError("texts is 1, must be at least 2 where held_out is not 0")
        if self.fit is not None and not self.held_out:
            raise ValueError("held_out is 0, must be more for a fit, which needs held-out texts")
        return self

    def support(self, pcl: int) -> int:
        """Fewest cells of a kept pattern, for maps of some Pattern Capture Length."""
        return self.min_support or max(1, pcl // 8)


def for_platform(config: CalibrationConfig, device: str) -> CalibrationConfig:
    """The settings with the platform of their fit, which is the calibration's unless told.

    Args:
        config: the settings.
        device: kind of device that calibrates.

    Returns:
        The settings; those without a fit are as given.

    Raises:
        CalibrationError: for pages that the platform does not serve.
    """
    fit = config.fit
    if fit is None:
        return config
    platform = fit.platform or device
    multiple = PAGE_MULTIPLES[platform]
    if fit.page % multiple:
        raise CalibrationError(
            f"fit.page is {fit.page}, must be a multiple of {multiple} where fit.platform is "
            f"{platform}"
        )
    return config.model_copy(update={"fit": fit.model_copy(update={"platform": platform})})


def meaning(settings: type[BaseModel], name: str) -> str:
    """What a setting means, for help texts."""
    return settings.model_fields[name].description or ""
