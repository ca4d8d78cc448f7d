"""Statistics of a study: means, intervals, and tests of paired differences."""

from crysdistill.studies.statistics.arms import (
    common_values,
    compare_paired,
    paired_values,
    summarise,
)
from crysdistill.studies.statistics.coverage import Calibration, calibration
from crysdistill.studies.statistics.crystals import compare_published, read_published
from crysdistill.studies.statistics.intervals import (
    Interval,
    hierarchical_interval,
    t_interval,
)
from crysdistill.studies.statistics.learning import (
    PowerLaw,
    fit_power_law,
    label_efficiency,
    labels_needed,
    learning_exponents,
)
from crysdistill.studies.statistics.paired import (
    BETTER,
    MARGIN,
    NO_DIFFERENCE,
    NO_PAIR,
    ONE_SEED,
    WORSE,
    holm,
    p_equal,
    p_no_worse,
    runs_needed,
)
from crysdistill.studies.statistics.results import (
    axes,
    check_results,
    comparable,
    higher_is_better,
)
from crysdistill.studies.statistics.shares import Share, gap_closed
from crysdistill.studies.statistics.tasks import over_tasks

__all__ = [
    "BETTER",
    "MARGIN",
    "NO_DIFFERENCE",
    "NO_PAIR",
    "ONE_SEED",
    "WORSE",
    "Calibration",
    "Interval",
    "PowerLaw",
    "Share",
    "axes",
    "calibration",
    "check_results",
    "common_values",
    "comparable",
    "compare_paired",
    "compare_published",
    "fit_power_law",
    "gap_closed",
    "hierarchical_interval",
    "higher_is_better",
    "holm",
    "label_efficiency",
    "labels_needed",
    "learning_exponents",
    "over_tasks",
    "p_equal",
    "p_no_worse",
    "paired_values",
    "read_published",
    "runs_needed",
    "summarise",
    "t_interval",
]
