"""The typed, validated, frozen view of a ConfigDict.

`configs/*.py` build an ml_collections ConfigDict; `validate` turns it into an `ExperimentConfig`, or raises a ConfigError of one
line that names the field, the value and what would be right. `schema.py` lists every field.
"""

from spark.config.convert import check_flags, differences, field_type, fields, from_file, load, nearest, template, validate
from spark.config.devices import check_devices
from spark.config.kinds import ATTENTION_KINDS, FFN_KINDS, Kind, matched_d_ff
from spark.config.schema import (
    RESUMABLE,
    AttentionConfig,
    DataConfig,
    ExperimentConfig,
    FFNConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    ServeConfig,
    TrainConfig,
)

__all__ = [
    'ATTENTION_KINDS', 'FFN_KINDS', 'RESUMABLE', 'AttentionConfig', 'DataConfig', 'ExperimentConfig', 'FFNConfig', 'Kind',
    'MeshConfig', 'ModelConfig', 'OptimizerConfig', 'SampleConfig', 'ServeConfig', 'TrainConfig', 'check_devices', 'check_flags',
    'differences', 'field_type', 'fields', 'from_file', 'load', 'matched_d_ff', 'nearest', 'template', 'validate',
]  # fmt: skip
