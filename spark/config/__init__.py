"""The typed, validated, frozen view of the ml_collections ConfigDicts that `configs/*.py` build.

`schema.py` has every field, but for those of the optimizer, which are in `optimizer.py`.
"""

from spark.config.convert import (
    check_flags,
    differences,
    field_type,
    fields,
    from_file,
    given,
    load,
    nearest,
    template,
    upgraded,
    validate,
)
from spark.config.devices import check_devices
from spark.config.evals import EvalConfig, eval_entries
from spark.config.kinds import ATTENTION_KINDS, FFN_KINDS, Kind, adapted, called, matched_d_ff
from spark.config.layers import without_unread
from spark.config.optimizer import by_pattern
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
)

__all__ = [
    'ATTENTION_KINDS', 'FFN_KINDS', 'RESUMABLE', 'SCHEDULE', 'AttentionConfig', 'DataConfig', 'EvalConfig', 'ExperimentConfig',
    'FFNConfig', 'Kind', 'MeshConfig', 'ModelConfig', 'OptimizerConfig', 'ServeConfig', 'TrainConfig', 'adapted', 'by_pattern',
    'called', 'check_devices', 'check_flags', 'differences', 'eval_entries', 'field_type', 'fields', 'from_file', 'given', 'load',
    'matched_d_ff', 'nearest', 'template', 'upgraded', 'validate', 'without_unread',
]  # fmt: skip
