"""The typed, validated, frozen view of the ml_collections ConfigDicts that `configs/*.py` build. `schema.py` has every field."""

from spark.config.convert import check_flags, differences, field_type, fields, from_file, given, load, nearest, template, validate
from spark.config.devices import check_devices
from spark.config.evals import EvalConfig, eval_entries
from spark.config.kinds import ATTENTION_KINDS, FFN_KINDS, Kind, matched_d_ff
from spark.config.schema import (
    RESUMABLE,
    SCHEDULE,
    AttentionConfig,
    DataConfig,
    ExperimentConfig,
    FFNConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ServeConfig,
    TrainConfig,
    by_pattern,
)

__all__ = [
    'ATTENTION_KINDS', 'FFN_KINDS', 'RESUMABLE', 'SCHEDULE', 'AttentionConfig', 'DataConfig', 'EvalConfig', 'ExperimentConfig',
    'FFNConfig', 'Kind', 'MeshConfig', 'ModelConfig', 'OptimizerConfig', 'ServeConfig', 'TrainConfig', 'by_pattern',
    'check_devices', 'check_flags', 'differences', 'eval_entries', 'field_type', 'fields', 'from_file', 'given', 'load',
    'matched_d_ff', 'nearest', 'template', 'validate',
]  # fmt: skip
