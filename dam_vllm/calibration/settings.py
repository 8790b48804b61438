"""The settings of a calibration and of its fit: YAML file and command-line options."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dam_vllm.calibration.errors import CalibrationError

# How far the predictions of the loss trust probes of whole layers over those of single heads.
TRUSTS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROOFS_A_CURVE = 3  # choices measured at most for an error; for a density one is enough
# Assignments of anchors beside the free one: none, one a layer, and few anchors of two numbers.
ASSIGNMENTS = 4
TRUSTS_KEPT = 1  # they are measured for as many trusts, the free one's best
# Density of the frontier's other points over that of the one taken.
FRONTIER_STEPS = (0.5, 0.7, 1.5, 2.5)


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
        query_blocks: static query blocks of context that are measured in each text.
        taus: thresholds of the true mask that are tried for static heads.
        mus: shares of a pattern's cells that are tried for static heads.
        channels: channels that score a token, or None for an eighth, a quarter and a half of a
            head's.
        ranks: tensor-parallel ranks that the masks are for: heads read what heads of their own rank
            chose, since serving refuses others.
        choosing_cost: what choosing pages costs, over what was measured on the platform
            (`fit.costs`): 1 counts it as it is, 0 not at all.
        seed: of questions and query blocks.
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
    query_blocks: int = Field(default=8, ge=1)
    taus: list[float] = Field(default=[0.05, 0.1, 0.2, 0.3], min_length=1)
    mus: list[float] = Field(default=[0.6, 0.8], min_length=1)
    channels: list[int] | None = None
    ranks: int = Field(default=1, ge=1)
    choosing_cost: float = Field(default=1.0, ge=0)
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
        curves = len(TRUSTS) + ASSIGNMENTS * TRUSTS_KEPT
        a_curve = 1 if self.target_error is None else PROOFS_A_CURVE
        return curves * a_curve + len(FRONTIER_STEPS)


AmplificationName = Literal[
    "box-cox", "sqrt", "log", "yeo-johnson", "z-score", "min-max", "average", "sum", "arcsinh"
]


TARGETS = ("target_error", "target_density")
MEMORY_TARGET = "target_kv_memory"


class Amplification(BaseModel):
    """How mean attention is amplified before the threshold (paper, Stage 1 and appendix).

    Attributes:
        name: the function, see `dam_vllm.calibration.static.amplify`.
        lambda_: exponent of Box-Cox and Yeo-Johnson ("lambda" in YAML).
        epsilon: smallest mean attention that is told apart from none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: AmplificationName = "box-cox"
    lambda_: float = Field(default=0.5, alias="lambda", ge=-2, le=2)
    epsilon: float = Field(default=1e-8, gt=0, le=1e-2)


class CalibrationConfig(BaseModel):
    """Settings of a calibration, independent of the model; the defaults are the paper's.

    Attributes:
        pcl: Pattern Capture Length in tokens, or None for the longest that memory, the model
            and the texts allow.
        amplification: how mean attention is amplified.
        tau: threshold of the true mask, on the amplified scale.
        mu: share of a pattern's cells that must be in the true mask for it to be kept.
        min_support: cells that a pattern needs to be considered, or None for pcl / 8; beyond the
            PCL the same share of the map of pages.
        reach: length in tokens up to which columns and diagonals are looked for on maps of
            pages, or None for the PCL.
        map_page: tokens a page of these maps.
        long_texts: largest number of windows of `reach` tokens that they are captured on.
        texts: largest number of windows, held-out ones included.
        window: tokens of a held-out window, or None for the PCL; a longer one measures the
            extended mask too.
        held_out: share of the texts on which coverage is measured instead.
        batch_size: windows a forward pass.
        seed: of the choice and the split of texts.
        fit: how every KV head's mode is fitted, or None for the paper's static masks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pcl: int | None = Field(default=None, ge=16)
    amplification: Amplification = Amplification()
    tau: float = 0.3
    mu: float = Field(default=0.8, gt=0, le=1)
    min_support: int | None = Field(default=None, ge=1)
    reach: int | None = Field(default=None, ge=32)
    map_page: int = Field(default=32, ge=2)
    long_texts: int = Field(default=16, ge=1)
    texts: int = Field(default=256, ge=1)
    window: int | None = Field(default=None, ge=16)
    held_out: float = Field(default=0.1, ge=0, le=0.5)
    batch_size: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    fit: FitConfig | None = None

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


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> CalibrationConfig:
    """Reads a YAML file and lays options over it.

    Args:
        path: the file, or None for the defaults.
        overrides: values by field name, those of TARGETS and MEMORY_TARGET for the fit; None
            means not given.

    Returns:
        The validated settings.

    Raises:
        CalibrationError: if the file cannot be read, or for an unknown key or a value that is
            not allowed.
    """
    values = _read(Path(path)) if path is not None else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    targets = {key: given.pop(key) for key in TARGETS if key in given}
    memory = {key: given.pop(key) for key in (MEMORY_TARGET,) if key in given}
    values |= given
    if targets or memory:
        fit = values.get("fit") or {}
        kept = {key: fit[key] for key in fit if key not in TARGETS or not targets}
        values["fit"] = kept | targets | memory
    try:
        return CalibrationConfig.model_validate(values)
    except ValidationError as error:
        source = f"{path}: " if path is not None else ""
        problems = "; ".join(_explain(item) for item in error.errors())
        raise CalibrationError(source + problems) from None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CalibrationError(f"--config is {str(path)!r}, must be a YAML file that exists")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--config {path} is no YAML file: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise CalibrationError(
            f"--config {path} holds a {type(values).__name__}, must hold keys and values"
        )
    return values


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        owners: dict[Any, type[BaseModel]] = {"amplification": Amplification, "fit": FitConfig}
        owner = owners[item["loc"][0]] if len(item["loc"]) > 1 else CalibrationConfig
        fields = owner.model_fields
        allowed = ", ".join(field.alias or name for name, field in fields.items())
        return f"unknown key {path!r} (value {item['input']!r}); allowed are {allowed}"
    if item["type"] == "value_error":
        return (f"{path}: " if path else "") + str(item["msg"]).removeprefix("Value error, ")
    return f"{path} is {item['input']!r}: {item['msg']}"
